//! Catalog and use cases: import, launch, stop, remove
