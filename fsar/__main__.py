"`python -m fsar`: the command line as a module, which is what launchers start: `torchrun --nproc_per_node=2 -m fsar train …`."
import sys

from fsar.cli.main import main

sys.exit(main())
