#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ramshot_fuzz::reader_mutated(data));
