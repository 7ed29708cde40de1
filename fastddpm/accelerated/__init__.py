"""What fastddpm.accelerate puts into other people's networks: our U-Net in place of a network that
it knows, or our ops in place of single layers. Every part can be taken out again, and steps aside
by itself where the network is not what it was."""
