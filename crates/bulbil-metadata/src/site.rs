//! An instance's metadata, ready to be served.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulbil_types::Personality;

use crate::tree::Dir;
use crate::view::InstanceView;
use crate::{alibaba, ec2, nocloud};

/// 169.254.169.254: AWS, and NoCloud over HTTP.
const EC2_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));
/// fd00:ec2::254: AWS over IPv6, which cloud-init tries beside the other.
const EC2_ADDRESS_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254));
/// 100.100.100.200: Alibaba Cloud.
const ALIBABA_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200));

/// One state of an [`InstanceView`] and the tree made of it.
///
/// Making one costs some tens of microseconds, answering from it does not build anything again;
/// a changed view is a new site.
#[derive(Debug, Clone)]
pub struct Site {
    view: InstanceView,
    root: Dir,
}

impl Site {
    /// Builds the tree of the view's personality.
    #[must_use]
    pub fn new(view: InstanceView) -> Self {
        let root = match view.personality {
            Personality::Ec2 => ec2::tree(&view),
            Personality::Alibaba => alibaba::tree(&view),
            Personality::NoCloud => nocloud::tree(&view),
        };
        Self { view, root }
    }

    /// The view the tree was made of.
    #[must_use]
    pub fn view(&self) -> &InstanceView {
        &self.view
    }

    /// The whole tree, from `/`.
    #[must_use]
    pub fn root(&self) -> &Dir {
        &self.root
    }

    /// The addresses at which a guest of this personality finds its metadata, the usual one first.
    #[must_use]
    pub fn addresses(&self) -> &'static [IpAddr] {
        match self.view.personality {
            Personality::Ec2 => &[EC2_ADDRESS, EC2_ADDRESS_V6],
            Personality::Alibaba => &[ALIBABA_ADDRESS],
            Personality::NoCloud => &[EC2_ADDRESS],
        }
    }
}
