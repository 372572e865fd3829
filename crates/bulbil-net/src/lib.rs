//! An instance's Ethernet: ARP, DHCP, DNS, NAT, port forwards
