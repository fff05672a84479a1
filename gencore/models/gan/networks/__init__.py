"""The bodies of generators and discriminators, a file for each architecture, and the layers that they share."""
