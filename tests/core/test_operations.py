# SPDX-License-Identifier: Apache-2.0
"""Every operation that is a site, against twins written by hand at tolerance 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress import Recipe, Rule, quantize_aware
from tests.twins import ROUNDING, assert_same, assert_twins, names, normal, token, weight

W, X = normal(4, 8, seed=1), normal(6, 4, seed=2)
PRECISION = lax.Precision


def dots(fn, *args) -> list:
    """The equations of all matmuls and convolutions below `fn`."""
    found, todo = [], [jax.make_jaxpr(fn)(*args).jaxpr]
    while todo:
        for eqn in todo.pop().eqns:
            found += [eqn] if eqn.primitive.name in ("dot_general", "conv_general_dilated") else []
            for value in eqn.params.values():
                for item in value if isinstance(value, (tuple, list)) else (value,):
                    item = getattr(item, "jaxpr", item)
                    todo += [item] if hasattr(item, "eqns") else []
    return found


# ---------------------------------------------------------------------- dot_general


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("x_axis", [0, 1])
@pytest.mark.parametrize("w_axis", [0, 1])
def test_dot_general_in_all_orders(weight_first, x_axis, w_axis):
    w, x = normal(5, 5, seed=1), normal(5, 5, seed=2)

    def f(w, x, qw=lambda w: w, qx=lambda x: x):
        pair, axes = (qx(x), qw(w)), ((x_axis,), (w_axis,))
        if weight_first:
            pair, axes = pair[::-1], axes[::-1]
        return lax.dot_general(*pair, dimension_numbers=(axes, ((), ())))

    def twin(w, x):
        return f(w, x, lambda w: weight(w, w_axis), lambda x: token(x, x_axis))

    assert_twins(quantize_aware(f, "w8a8"), twin, w, x)


def test_dot_general_that_contracts_two_axes():
    w, x = normal(3, 5, 4, seed=1), normal(4, 6, 3, seed=2)
    dims = (((0, 2), (2, 0)), ((), ()))
    assert_twins(
        quantize_aware(
            lambda w, x: lax.dot_general(x, w, ((dims[0][1], dims[0][0]), dims[1])), "w8a8"
        ),
        lambda w, x: lax.dot_general(
            token(x, (0, 2)), weight(w, (0, 2)), ((dims[0][1], dims[0][0]), dims[1])
        ),
        w,
        x,
    )


def test_dot_general_with_batch_dimensions():
    w, x = normal(4, 3, 5, seed=1), normal(3, 6, 4, seed=2)  # batch is axis 1 of w, 0 of x
    dims = (((2,), (0,)), ((0,), (1,)))
    assert_twins(
        quantize_aware(lambda w, x: lax.dot_general(x, w, dims), "w8a8"),
        lambda w, x: lax.dot_general(token(x, 2), weight(w, 0), dims),
        w,
        x,
    )


def test_dot_general_without_contraction():
    """Every value has its own scale, so it is its own nearest value up to rounding."""
    w, x = normal(5, seed=1), normal(6, seed=2)
    outer = lambda w, x: lax.dot_general(x, w, (((), ()), ((), ())))  # noqa: E731
    assert_twins(
        quantize_aware(outer, "w8a8"), lambda w, x: outer(weight(w, ()), token(x, ())), w, x
    )


@pytest.mark.parametrize(
    "spell",
    [
        lambda x, w: x @ w,
        jnp.dot,
        jnp.matmul,
        lax.dot,
        lambda x, w: jnp.inner(x, w.T),
        lambda x, w: jnp.tensordot(x, w, 1),
        lambda x, w: jnp.einsum("bi,io->bo", x, w),
        lambda x, w: jax.vmap(jnp.dot, (0, None))(x, w),
        lambda x, w: (w.T @ x.T).T,
        lambda x, w: jnp.linalg.matmul(x, w),
        lambda x, w: lax.dot_general_p.bind(
            x,
            w,
            dimension_numbers=(((1,), (0,)), ((), ())),
            precision=None,
            preferred_element_type=jnp.dtype("float32"),
            out_sharding=None,
        ),
    ],
)
def test_every_spelling_of_a_matmul(spell):
    assert names(lambda w, x: spell(x, w), W, X) == ["arg0"]
    assert_twins(
        quantize_aware(lambda w, x: spell(x, w), "w8a8"),
        lambda w, x: spell(token(x), weight(w)),
        W,
        X,
    )


def test_batched_matmul_broadcasts_the_weight():
    x = normal(2, 6, 4)
    assert_twins(
        quantize_aware(lambda w, x: jnp.matmul(x, w), "w8a8"),
        lambda w, x: jnp.matmul(token(x), weight(w)),
        W,
        x,
    )
    experts, x = normal(3, 4, 8), normal(3, 6, 4)
    assert_twins(
        quantize_aware(lambda w, x: jnp.matmul(x, w), "w8a8"),
        lambda w, x: jnp.matmul(token(x), weight(w, 1)),
        experts,
        x,
    )


def test_vector_operands():
    x = normal(4, seed=3)
    assert_twins(
        quantize_aware(lambda w, x: x @ w, "w8a8"), lambda w, x: token(x, 0) @ weight(w), W, x
    )
    assert_twins(
        quantize_aware(lambda w, x: w.T @ x, "w8a8"),
        lambda w, x: weight(w.T, 1) @ token(x, 0),
        W,
        x,
    )


# ---------------------------------------------------------------------- einsum


def test_einsum_of_three_operands():
    p = {"a": normal(4, 3, seed=1), "b": normal(3, 8, seed=2)}

    def f(p, x):
        return jnp.einsum("bi,ir,ro->bo", x, p["a"], p["b"], optimize=[(0, 1), (0, 1)])

    def twin(p, x):
        return token(token(x) @ weight(p["a"])) @ weight(p["b"])

    assert names(f, p, X) == ["a", "b"]
    assert_twins(quantize_aware(f, "w8a8"), twin, p, X, tolerance=ROUNDING)


def test_einsum_of_three_operands_on_any_path():
    """Whatever order opt_einsum picks, what meets data is quantized and the names say it."""
    p = {"a": normal(4, 3, seed=1), "b": normal(3, 8, seed=2)}

    def f(p, x):
        return jnp.einsum("bi,ir,ro->bo", x, p["a"], p["b"])

    assert set("+".join(names(f, p, X)).replace("#1", "").split("+")) == {"a", "b"}
    error = float(jnp.abs(quantize_aware(f, Recipe([Rule("*", "int4")]))(p, X) - f(p, X)).max())
    assert error > 1e-2


def test_einsum_with_weight_that_is_summed_and_transposed():
    w, x = normal(8, 2, 4, seed=1), normal(6, 4, seed=2)
    assert_twins(
        quantize_aware(lambda w, x: jnp.einsum("hki,bi->bhk", w, x), "w8a8"),
        lambda w, x: jnp.einsum("hki,bi->bhk", weight(w, 2), token(x)),
        w,
        x,
    )


# ---------------------------------------------------------------------- attention


def attention(p, x, qw=lambda w: w, qx=lambda x: x):
    heads = [(qx(x) @ qw(p[n])).reshape(1, 6, 2, 4) for n in ("q", "k", "v")]
    return jax.nn.dot_product_attention(*heads)


ATTENTION = {n: normal(4, 8, seed=i) for i, n in enumerate("qkv")}


def test_attention_scores_stay_in_float_without_a_rule():
    assert_twins(
        quantize_aware(attention, "w8a8"),
        lambda p, x: attention(p, x, weight, token),
        ATTENTION,
        X,
    )
    sites = jc.sites(attention)(ATTENTION, X)
    assert [s.name for s in sites[:3]] == ["q", "k", "v"] and len(sites) == 5
    assert all(o.role == "activation" for s in sites[3:] for o in s.operands)


def test_attention_scores_by_a_rule_with_op():
    def f(p, x):
        q = (x @ p["q"]).reshape(6, 2, 4)
        s = jax.nn.softmax(jnp.einsum("nhd,mhd->hnm", q, q))
        return jnp.einsum("hnm,mhd->nhd", s, q)

    def twin(p, x):
        q = (x @ p["q"]).reshape(6, 2, 4)
        s = jax.nn.softmax(jnp.einsum("nhd,mhd->hnm", token(q), token(q)))
        return jnp.einsum("hnm,mhd->nhd", token(s), token(q, 0))

    recipe = Recipe([Rule("q", None), Rule("*dot_general*", None, "int8", op="dot_general")])
    # Three cotangents of q meet: XLA adds them in another order.
    assert_twins(quantize_aware(f, recipe), twin, {"q": normal(4, 8)}, X, tolerance=ROUNDING)


# ---------------------------------------------------------------------- convolutions

LAYOUTS = {
    "NHWC": ("NHWC", "HWIO", "NHWC"),
    "NCHW": ("NCHW", "OIHW", "NCHW"),
    "batch last": ("CHWN", "IHWO", "CHWN"),
    "batch inside": ("HWNC", "HWIO", "HWNC"),
    "mixed": ("HNCW", "WOHI", "NHWC"),
}


def conv_twin(specs, groups=1, **kwargs):
    """(function, twin) of a convolution with these layouts."""
    n, o = specs[0].index("N"), specs[1].index("O")

    def f(w, x, qw=lambda w: w, qx=lambda x: x):
        return lax.conv_general_dilated(
            qx(x), qw(w), dimension_numbers=specs, feature_group_count=groups, **kwargs
        )

    def twin(w, x):
        rest = lambda v, keep: tuple(d for d in range(v.ndim) if d != keep)  # noqa: E731
        return f(w, x, lambda w: weight(w, rest(w, o)), lambda x: token(x, rest(x, n)))

    return f, twin


def arrays(specs, sizes):
    """Weight and input with the sizes of these letters: N, H, W, C, I, O, h, w."""
    x = normal(*(sizes[c] for c in specs[0]), seed=1)
    w = normal(*(sizes[c.lower() if c in "HW" else c] for c in specs[1]), seed=2)
    return w, x


SIZES = {"N": 2, "H": 6, "W": 5, "C": 4, "I": 4, "O": 6, "h": 3, "w": 2}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_in_every_layout(layout):
    specs = LAYOUTS[layout]
    f, twin = conv_twin(specs, window_strides=(1, 2), padding="SAME")
    w, x = arrays(specs, SIZES)
    assert names(f, w, x) == ["arg0"]
    assert_twins(quantize_aware(f, "w8a8"), twin, w, x)


@pytest.mark.parametrize("inputs, outputs, groups", [(2, 6, 2), (1, 4, 4), (1, 8, 4)])
def test_conv_grouped_and_depthwise(inputs, outputs, groups):
    specs = LAYOUTS["NHWC"]
    w, x = arrays(specs, {**SIZES, "I": inputs, "O": outputs})
    f, twin = conv_twin(specs, groups, window_strides=(1, 1), padding="VALID")
    assert_twins(quantize_aware(f, "w8a8"), twin, w, x)


def test_conv_of_one_dimension():
    specs = ("NWC", "WIO", "NWC")
    f, twin = conv_twin(specs, window_strides=(2,), padding="SAME")
    w, x = arrays(specs, SIZES)
    assert_twins(quantize_aware(f, "w8a8"), twin, w, x)


@pytest.mark.parametrize("dilation", [{"lhs_dilation": (2, 1)}, {"rhs_dilation": (1, 2)}])
def test_conv_dilated(dilation):
    specs = LAYOUTS["NCHW"]
    f, twin = conv_twin(specs, window_strides=(1, 1), padding=((1, 1), (1, 2)), **dilation)
    w, x = arrays(specs, SIZES)
    assert_twins(quantize_aware(f, "w8a8"), twin, w, x)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_conv_transpose(transpose_kernel):
    w, x = normal(3, 3, 4, 4, seed=1), normal(2, 5, 5, 4, seed=2)

    def f(w, x, qw=lambda w: w, qx=lambda x: x):
        return lax.conv_transpose(qx(x), qw(w), (2, 2), "SAME", transpose_kernel=transpose_kernel)

    # transpose_kernel swaps the channels of the kernel: the output is then its last but one.
    kept = 2 if transpose_kernel else 3
    axes = tuple(d for d in range(4) if d != kept)
    assert names(f, w, x) == ["arg0"]
    assert_twins(
        quantize_aware(f, "w8a8"),
        lambda w, x: f(w, x, lambda w: weight(w, axes), lambda x: token(x, (1, 2, 3))),
        w,
        x,
    )


def test_conv_keeps_preferred_element_type():
    specs = LAYOUTS["NHWC"]
    w, x = (a.astype(jnp.bfloat16) for a in arrays(specs, SIZES))
    f, twin = conv_twin(
        specs, window_strides=(1, 1), padding="SAME", preferred_element_type=jnp.float32
    )
    q = quantize_aware(f, "w8a8")
    assert q(w, x).dtype == jnp.float32
    assert_same(jax.jit(q)(w, x), jax.jit(twin)(w, x))


def test_conv_of_a_constant_filter_is_untouched_unless_frozen():
    specs = LAYOUTS["NHWC"]
    w, x = arrays(specs, SIZES)
    head = normal(6, 3)
    f, twin = conv_twin(specs, window_strides=(1, 1), padding="SAME")
    model = lambda p, x: f(w, x) @ p  # noqa: E731
    assert_twins(quantize_aware(model, "w8a8"), lambda p, x: token(f(w, x)) @ weight(p), head, x)
    frozen = Recipe([Rule("*", "int8", "int8", frozen=True)])
    assert_twins(quantize_aware(model, frozen), lambda p, x: token(twin(w, x)) @ weight(p), head, x)


# ---------------------------------------------------------------------- ragged_dot


def test_ragged_dot():
    w, x = normal(3, 4, 8, seed=1), normal(7, 4, seed=2)
    sizes = jnp.array([3, 0, 4], jnp.int32)
    f = lambda w, x: lax.ragged_dot(x, w, sizes)  # noqa: E731
    assert names(f, w, x) == ["arg0"]
    assert_twins(
        quantize_aware(f, "w8a8"),
        lambda w, x: lax.ragged_dot(token(x), weight(w, 1), sizes),
        w,
        x,
    )


# ---------------------------------------------------------------------- embeddings

TABLE, IDS = normal(10, 4, seed=4), jnp.array([3, 0, 9, 3])


@pytest.mark.parametrize(
    "read",
    [
        lambda t, i: t[i],
        lambda t, i: jnp.take(t, i, axis=0),
        lambda t, i: jnp.take(t, i, axis=0, mode="clip"),
        lambda t, i: jnp.take(t, i, axis=0, mode="wrap"),
        lambda t, i: jnp.take(t, i, axis=0, mode="fill"),
        lambda t, i: t.at[i].get(mode="promise_in_bounds"),
        lambda t, i: t[i.reshape(2, 2)],
        lambda t, i: t[i, :],
        lambda t, i: jax.vmap(lambda i: t[i])(i),
        lambda t, i: jax.vmap(lambda i: jnp.take(t, i, axis=0))(i),
        lambda t, i: lax.dynamic_slice_in_dim(t, i[0], 3),
        lambda t, i: lax.map(lambda i: t[i], i),
        lambda t, i: lax.dynamic_index_in_dim(t, i[0], keepdims=False),
        lambda t, i: t.T[:, i],
        lambda t, i: t.astype(jnp.bfloat16)[i],
    ],
)
def test_embedding_reads(read):
    f = lambda p, i: read(p["table"], i)  # noqa: E731
    p = {"table": TABLE}
    assert names(f, p, IDS) == ["table"]
    dtype = jax.eval_shape(f, p, IDS).dtype
    assert_twins(
        quantize_aware(f, "w8a8"),
        lambda p, i: read(weight(p["table"].astype(dtype), 1), i),
        p,
        IDS,
    )


def test_embedding_of_float_rows_is_the_activation_of_what_follows():
    p = {"table": TABLE, "w": W}

    def f(p, i):
        return (p["table"][i] * 2.0) @ p["w"] + p["table"][i] @ p["w"]

    def twin(p, i):
        rows = weight(p["table"], 1)[i]
        return token(rows * 2.0) @ weight(p["w"]) + token(rows) @ weight(p["w"])

    roles = [tuple(o.role for o in s.operands) for s in jc.sites(f)(p, IDS) if s.op != "gather"]
    assert roles == [("activation", "weight")] * 2
    assert_twins(quantize_aware(f, "w8a8"), twin, p, IDS)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16-g32", "w2a16-g32"])
def test_tied_table_has_one_format(recipe):
    """The head reads the very int8 values that the embedding reads, in every named recipe."""

    def f(p, i):
        return jnp.tanh(p["table"][i]) @ p["table"].T

    def twin(p, i):
        h = jnp.tanh(weight(p["table"], 1)[i])
        h = token(h) if recipe == "w8a8" else h
        return h @ weight(p["table"], 1).T

    assert names(f, {"table": TABLE}, IDS) == ["table", "table#1"]
    assert_twins(quantize_aware(f, recipe), twin, {"table": TABLE}, IDS)


def test_tied_table_with_two_formats_is_an_error():
    f = lambda p, i: p[i] @ p.T  # noqa: E731
    recipe = Recipe([Rule("*", "int4", op="gather"), Rule("*", "int8")])
    with pytest.raises(jc.RecipeError, match="two formats"):
        quantize_aware(f, recipe)(TABLE, IDS)


def test_positional_table_read_at_constant_places_is_no_site():
    p = {"positions": normal(16, 4, seed=5), "w": W}

    def f(p, x):
        return (x + p["positions"][:6] + p["positions"][jnp.arange(6)]) @ p["w"]

    def twin(p, x):
        return token(x + p["positions"][:6] + p["positions"][jnp.arange(6)]) @ weight(p["w"])

    assert names(f, p, X) == ["w"]
    assert_twins(quantize_aware(f, "w8a8"), twin, p, X)
    report = jc.report(f, "w8a8")(p, X)
    assert "positions" in str(report)


def test_experts_chosen_by_data_are_weights():
    """w[ids] picks whole matrices: the matmul quantizes them, once, per channel."""
    experts, x, ids = normal(3, 4, 8), normal(6, 4), jnp.array([0, 2, 1, 1, 0, 2])

    def f(w, x, ids):
        return jnp.einsum("bi,bio->bo", x, w[ids])

    def twin(w, x, ids):
        return jnp.einsum("bi,bio->bo", token(x), weight(w[ids], 1))

    assert names(f, experts, x, ids) == ["arg0"]
    assert_twins(quantize_aware(f, "w8a8"), twin, experts, x, ids)


@pytest.mark.parametrize("pick", [lambda w, i: w[i], lambda w, i: jnp.take(w, i, axis=0)])
def test_layer_chosen_by_data_is_a_weight(pick):
    f = lambda w, x: x @ pick(w, jnp.argmax(x[0, :3]))  # noqa: E731
    stack = normal(3, 4, 8)
    assert names(f, stack, X) == ["arg0"]
    assert_twins(
        quantize_aware(f, "w8a8"),
        lambda w, x: token(x) @ weight(pick(w, jnp.argmax(x[0, :3]))),
        stack,
        X,
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda p, i: p["w"][i] * p["scale"][i],
        lambda p, i: p["a"][i] @ p["b"][i],
        lambda p, i: p["w"][i] + p["a"][i] @ p["b"][i],
    ],
)
def test_arithmetic_on_a_chosen_layer_is_a_weight(make):
    p = {
        "w": normal(3, 4, 8, seed=1),
        "scale": normal(3, 4, 8, seed=2),
        "a": normal(3, 4, 2, seed=3),
        "b": normal(3, 2, 8, seed=4),
    }
    choose = lambda x: jnp.argmax(x[0, :3])  # noqa: E731
    assert_twins(
        quantize_aware(lambda p, x: x @ make(p, choose(x)), "w8a8"),
        lambda p, x: token(x) @ weight(make(p, choose(x))),
        p,
        X,
    )


def test_rows_of_a_constant_table_chosen_by_data_are_data():
    one_hot = jnp.eye(4)
    assert_twins(
        quantize_aware(lambda w, i: one_hot[i] @ w, "w8a8"),
        lambda w, i: token(one_hot[i]) @ weight(w),
        W,
        jnp.array([3, 1, 1]),
    )


def test_weight_looked_up_in_a_constant_table_by_integer_parameters():
    levels = jnp.linspace(-1.0, 1.0, 16)
    p = {"codes": jnp.arange(32).reshape(4, 8) % 16}
    f = lambda p, x: x @ levels[p["codes"]]  # noqa: E731
    assert names(f, p, X) == ["codes"]
    got = jax.jit(quantize_aware(f, "w8a8"))(p, X)
    assert_same(got, jax.jit(lambda p, x: token(x) @ weight(levels[p["codes"]]))(p, X))


def test_embedding_with_matrices_as_rows():
    """[vocabulary, heads, size]: what data chose is the activation of what follows."""
    p = {"table": normal(10, 2, 4, seed=5), "w": W}

    def model(qt, qx, qw):
        def f(p, i):
            h = qt(p["table"])[i] * 2.0
            h = jnp.tanh(qx(h) @ qw(p["w"]))
            return jnp.einsum("nhd,mhd->hnm", h, h)

        return f

    f = model(lambda t: t, lambda x: x, lambda w: w)
    twin = model(lambda t: weight(t, (1, 2)), token, weight)
    assert names(f, p, IDS)[:2] == ["table", "w"]
    assert_twins(quantize_aware(f, "w8a8"), twin, p, IDS)


def test_single_numbers_chosen_by_data_are_no_embedding():
    f = lambda p, x, i: (x @ p["w"]) * p["scale"][i][None]  # noqa: E731
    p, i = {"w": W, "scale": normal(5)}, jnp.arange(8) % 5
    assert names(f, p, X, i) == ["w"]


# ---------------------------------------------------------------------- what is left alone


def test_preferred_element_type_and_precision_are_kept():
    w, x = W.astype(jnp.bfloat16), X.astype(jnp.bfloat16)
    dims = (((1,), (0,)), ((), ()))

    def f(w, x):
        return lax.dot_general(
            x, w, dims, precision=PRECISION.HIGHEST, preferred_element_type=jnp.float32
        )

    def twin(w, x):
        return lax.dot_general(
            token(x),
            weight(w),
            dims,
            precision=PRECISION.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    q = quantize_aware(f, "w8a8")
    assert q(w, x).dtype == jnp.float32
    (eqn,) = dots(q, w, x)
    assert eqn.params["precision"] == (PRECISION.HIGHEST,) * 2
    assert eqn.params["preferred_element_type"] == jnp.float32
    assert_twins(q, twin, w, x)


def test_bfloat16_results_stay_bfloat16():
    w, x = W.astype(jnp.bfloat16), X.astype(jnp.bfloat16)
    assert_twins(
        quantize_aware(lambda w, x: x @ w, "w8a8"), lambda w, x: token(x) @ weight(w), w, x
    )


def test_cast_of_the_weight_is_still_the_weight():
    f = lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)  # noqa: E731
    assert names(f, W, X) == ["arg0"]
    assert_twins(
        quantize_aware(f, "w8a8"),
        lambda w, x: token(x.astype(jnp.bfloat16)) @ weight(w.astype(jnp.bfloat16)),
        W,
        X,
    )


def test_constant_weight_is_untouched_unless_frozen():
    constant = normal(8, 3, seed=7)
    f = lambda w, x: (x @ w) @ constant  # noqa: E731
    assert_twins(quantize_aware(f, "w8a8"), lambda w, x: (token(x) @ weight(w)) @ constant, W, X)
    frozen = Recipe([Rule("*", "int8", "int8", frozen=True)])
    assert_twins(
        quantize_aware(f, frozen),
        lambda w, x: token(token(x) @ weight(w)) @ weight(constant),
        W,
        X,
    )


def test_closed_over_teacher_is_untouched():
    teacher = {"w": normal(4, 8, seed=8)}

    def loss(p, x):
        return x @ p["w"] - jnp.tanh(x @ teacher["w"])

    assert_twins(
        quantize_aware(loss, "w8a8"),
        lambda p, x: token(x) @ weight(p["w"]) - jnp.tanh(x @ teacher["w"]),
        {"w": W},
        X,
    )


def test_product_of_weights_is_left_alone_and_its_result_quantized():
    p = {"w": W, "a": normal(4, 2, seed=5), "b": normal(2, 8, seed=6)}

    def f(p, x):
        return x @ (p["w"] + 0.5 * p["a"] @ p["b"])

    assert names(f, p, X) == ["a", "a+b+w"]
    assert_twins(
        quantize_aware(f, "w8a8"),
        lambda p, x: token(x) @ weight(p["w"] + 0.5 * p["a"] @ p["b"]),
        p,
        X,
    )


def test_lora_beside_the_weight():
    p = {"w": W, "a": normal(4, 2, seed=5), "b": normal(2, 8, seed=6)}
    f = lambda p, x: x @ p["w"] + (x @ p["a"]) @ p["b"]  # noqa: E731
    recipe = Recipe([Rule("w", "int8")])
    assert_twins(
        quantize_aware(f, recipe),
        lambda p, x: x @ weight(p["w"]) + (x @ p["a"]) @ p["b"],
        p,
        X,
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True) * p["g"][None],
        lambda p: p["v"] * (jnp.abs(p["v"]) > 0.3),
        lambda p: jnp.concatenate([p["v"][:, :4], p["v"][:, 4:] * p["g"][None, 4:]], axis=1),
        lambda p: jnp.stack([p["v"], p["v"] * 2])[1],
        lambda p: jnp.pad(p["v"], ((0, 0), (0, 2))),
        lambda p: p["v"].reshape(2, 2, 8).transpose(1, 0, 2).reshape(4, 8),
        lambda p: jnp.where(jnp.eye(4, 8) > 0, 0.0, p["v"]),
        lambda p: jnp.linalg.qr(p["v"].T)[0].T,
    ],
)
def test_weights_computed_from_parameters(make):
    p = {"v": W, "g": normal(8, seed=9)}
    assert_twins(
        quantize_aware(lambda p, x: x @ make(p), "w8a8"),
        lambda p, x: token(x) @ weight(make(p)),
        p,
        X,
    )


def test_zero_size_operands_are_untouched():
    for w, x in ((W, normal(0, 4)), (normal(4, 0), X), (normal(0, 8), normal(6, 0))):
        f = lambda w, x: x @ w  # noqa: E731
        assert_twins(quantize_aware(f, "w8a8"), f, w, x)


def test_integer_and_complex_dots_are_untouched():
    p = {"w": W, "c": W.astype(jnp.complex64), "n": jnp.arange(32).reshape(4, 8)}

    def f(p, x, qx=lambda x: x, qw=lambda w: w):
        integer = jnp.ones((6, 4), jnp.int32) @ p["n"]
        return qx(x) @ qw(p["w"]), integer, jnp.abs(x.astype(jnp.complex64) @ p["c"])

    got = jax.jit(quantize_aware(f, "w8a8"))(p, X)
    assert_same(got, jax.jit(lambda p, x: f(p, x, token, weight))(p, X))


def test_empty_recipe_gives_the_same_bits():
    def f(p, i):
        h = jnp.tanh(p["table"][i] @ p["w"])
        return jax.nn.log_softmax(jax.nn.gelu(h)), h @ h.T

    p = {"table": TABLE, "w": W}
    assert_twins(quantize_aware(f, Recipe([])), f, p, IDS)
    assert_same(quantize_aware(f, Recipe([]))(p, IDS), jax.jit(f)(p, IDS))


def test_numpy_leaves():
    p = {"w": np.asarray(W)}
    f = lambda p, x: x @ p["w"]  # noqa: E731
    assert_twins(
        quantize_aware(f, "w8a8"),
        lambda p, x: token(x) @ weight(jnp.asarray(p["w"])),
        p,
        np.asarray(X),
    )
