#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bulbil_fuzz::run("vhd", data);
});
