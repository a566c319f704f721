"""`python -m lora_kernels`: the command line, in lora_kernels.cli."""

import sys

from lora_kernels.cli.main import main

sys.exit(main())
