"""`python -m tokenflow`, which is what `torchrun -m tokenflow train ...` starts."""

import sys

from tokenflow.cli import main

sys.exit(main())
