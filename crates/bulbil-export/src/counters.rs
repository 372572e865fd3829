//! Counters that servers share between their threads.

/// Makes the type `Counters` of a server, with one counter for each field of its `Stats`.
macro_rules! counters {
    ($($field:ident),* $(,)?) => {
        #[derive(Debug, Default)]
        pub(super) struct Counters { $(pub(super) $field: ::std::sync::atomic::AtomicU64),* }

        impl Counters {
            pub(super) fn snapshot(&self) -> Stats {
                Stats { $($field: self.$field.load(::std::sync::atomic::Ordering::Relaxed)),* }
            }

            pub(super) fn count(counter: &::std::sync::atomic::AtomicU64) {
                counter.fetch_add(1, ::std::sync::atomic::Ordering::Relaxed);
            }
        }
    };
}
