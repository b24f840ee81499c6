# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Makes ``kvxfer.kernels`` importable from the source tree without the transfer engine, which is not built here."""

from __future__ import annotations

import sys
import types
from pathlib import Path

package = types.ModuleType("kvxfer")
package.__path__ = [str(Path(__file__).resolve().parents[2] / "python" / "kvxfer")]
sys.modules["kvxfer"] = package
