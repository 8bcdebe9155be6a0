"""From one run to sweeps, comparisons and studies."""
