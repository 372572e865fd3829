//! The REST API of the Bulbil daemon, server and client
