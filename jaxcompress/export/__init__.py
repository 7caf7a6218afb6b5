# SPDX-License-Identifier: Apache-2.0
"""What leaves the library: parameters on disk, and programs that run without the model's code."""

from ._artifact import Artifact as Artifact
from ._artifact import load as load
from ._edge import onnx as onnx
from ._edge import onnx_primitives as onnx_primitives
from ._fpga import hls4ml as hls4ml
from ._fpga import qonnx as qonnx
from ._params import load_params as load_params
from ._params import save_params as save_params
from ._stablehlo import stablehlo as stablehlo
from ._verify import Verification as Verification
from ._verify import verify as verify
