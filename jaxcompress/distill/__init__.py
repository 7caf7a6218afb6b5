# SPDX-License-Identifier: Apache-2.0
"""Distillation: a student function is trained to match a teacher function."""

from ._attention_transfer import attention_transfer as attention_transfer
from ._cka import cka as cka
from ._crd import crd as crd
from ._dist import dist as dist
from ._divergences import jsd as jsd
from ._divergences import kl as kl
from ._divergences import reverse_kl as reverse_kl
from ._divergences import skew_kl as skew_kl
from ._divergences import skew_reverse_kl as skew_reverse_kl
from ._dkd import dkd as dkd
from ._driver import loss_fn as loss_fn
from ._fitnet import fitnet as fitnet
from ._logits import cosine as cosine
from ._logits import mse_logits as mse_logits
from ._loss import Loss as Loss
from ._loss import batch_loss as batch_loss
from ._loss import row_loss as row_loss
from ._match import Match as Match
from ._match import match as match
from ._minilm import minilm as minilm
from ._minilm import uniform_layers as uniform_layers
from ._on_policy import on_policy as on_policy
from ._pkt import pkt as pkt
from ._rkd import rkd as rkd
from ._self import ema as ema
from ._self import ema_params as ema_params
from ._self import mutual as mutual
from ._similarity import similarity as similarity
from ._top_k import TopK as TopK
from ._top_k import top_k as top_k
from ._top_k import top_k_kl as top_k_kl
from ._vocab import vocab_jsd as vocab_jsd
from ._vocab import vocab_kl as vocab_kl
from ._vocab import vocab_reverse_kl as vocab_reverse_kl
