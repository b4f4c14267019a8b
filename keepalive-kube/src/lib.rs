//! The companion in Kubernetes: what the API says about pods and policies becomes
//! config for the agent of this node.
//!
//! What talks to the network has no privileges, and what has privileges has no
//! network: the two share a directory of drop-ins, and nothing else.
//!
//! [`objects`] is what is known of the cluster, [`watch`] keeps it up to date,
//! [`policy`] reads one policy, [`bounds`] holds those of a namespace within those
//! of the cluster, [`config`] makes TOML of all of it. [`node`] writes that for the
//! agent; [`controller`] tells people what became of their policies,
//! [`uninstall`] waits for the nodes to be left as they were.
#![forbid(unsafe_code)]

pub mod api;
pub mod bounds;
pub mod config;
pub mod controller;
pub mod crd;
pub mod evidence;
mod metadata;
pub mod node;
pub mod objects;
pub mod policy;
pub mod uninstall;
pub mod watch;
