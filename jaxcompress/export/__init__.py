# SPDX-License-Identifier: Apache-2.0
"""What leaves the library: parameters on disk."""

from ._params import load_params as load_params
from ._params import save_params as save_params
