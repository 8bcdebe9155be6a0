"""What the library costs, measured on the machine at hand."""
