//! Serves block devices over NBD
