"""The command line: one module or sub-package for each command, found by lora_kernels.cli.main."""
