//! bpf
fn main(){}
