//! Test support: fakes, oracles, fixtures
