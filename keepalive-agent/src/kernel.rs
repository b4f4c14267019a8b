//! What the running kernel is and where it keeps what we read.

pub mod btf;
pub mod layout;
mod mapped_file;
pub mod preflight;

/// Release of the running kernel, such as `6.12.107-cloud-amd64`.
#[must_use]
pub fn release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}
