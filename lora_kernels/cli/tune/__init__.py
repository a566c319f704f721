"""The tune command: measures tile configurations on this GPU and writes the table that the kernels then use."""
