"""Files, the machine, configuration, registries and errors."""
