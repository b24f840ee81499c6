# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m kvxfer`: the same as the `kvxfer` command."""

from __future__ import annotations

import sys

from kvxfer.cli import main

if __name__ == "__main__":
    sys.exit(main())
