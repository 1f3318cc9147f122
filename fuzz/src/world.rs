pub fn core_events(_: &[u8]) {}
