"""`python -m draftdiff` is the command `draftdiff`."""

from draftdiff.cli import main

raise SystemExit(main())
