"""What turns frames into feature maps."""
