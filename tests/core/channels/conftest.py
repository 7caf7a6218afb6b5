# SPDX-License-Identifier: Apache-2.0
"""The networks here are written as users write them: biases are broadcast."""

import jax
import pytest


@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield
