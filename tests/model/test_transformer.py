"""The policy against NumPy, its branches against whole sequences, and its way to disk and back."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rpt_jax.errors import UserError
from rpt_jax.model.model_config import PRESETS, preset
from rpt_jax.model.transformer import Transformer, branch_hidden, head, prefill, rms_norm, rotary_angles, rotate
from rpt_jax.weights.hf import WEIGHTS, load_model_config, load_policy, save_policy
from tests.helpers import policy_reference as reference
from tests.helpers.policy_reference import POLICY, SHALLOW, SHAPE, random_params

# Grouped, full and multi-query attention.
VARIANTS = {
    "llama": SHAPE,
    "qwen2": dataclasses.replace(SHAPE, kv_heads=4, qkv_bias=True, tied=False, rope_base=1e6, norm_epsilon=1e-5),
    "qwen3": dataclasses.replace(SHAPE, kv_heads=1, qk_norm=True, head_size=6, layers=7),
}
LENGTHS = np.array([1, 4, 6], np.int32)
PROMPTS = np.random.default_rng(1).integers(0, SHAPE.vocab, (3, 6)).astype(np.int32)
RESPONSES = np.random.default_rng(2).integers(0, SHAPE.vocab, (3, 2, 5)).astype(np.int32)

hidden_of_branches = jax.jit(branch_hidden, static_argnames="policy")


def same_trees(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, a, b))


# --- the forward pass --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_branches_equal_every_sequence_alone(name):
    """What lies behind a prompt's end is poison: random ids that no response may notice."""
    shape, params = VARIANTS[name], random_params(Transformer(VARIANTS[name]), 0)
    ours = hidden_of_branches(Transformer(shape), params, PROMPTS, LENGTHS, RESPONSES)
    for p, g in np.ndindex(RESPONSES.shape[:2]):
        prompt = PROMPTS[p, : LENGTHS[p]]
        alone = reference.hidden(params, shape, [*prompt, *RESPONSES[p, g]])
        # The state that predicts a token is that of the token before it; the last one predicts nothing.
        np.testing.assert_allclose(ours[p, g], alone[len(prompt) - 1 : -1], atol=1e-5)


def test_padding_changes_nothing():
    params = random_params(POLICY, 0)
    ours = hidden_of_branches(POLICY, params, PROMPTS, LENGTHS, RESPONSES)
    other = np.where(np.arange(6) < LENGTHS[:, None], PROMPTS, (PROMPTS + 7) % SHAPE.vocab)
    assert (other != PROMPTS).any()
    np.testing.assert_array_equal(hidden_of_branches(POLICY, params, other, LENGTHS, RESPONSES), ours)


def test_prefill_gives_every_state_and_the_last_real_one():
    params = random_params(POLICY, 3)
    hidden_PxSxD, context, last_PxD = jax.jit(prefill, static_argnames="policy")(POLICY, params, PROMPTS, LENGTHS)
    assert context.kv.k.shape == context.kv.v.shape == (SHAPE.layers, 3, SHAPE.kv_heads, 1, 6, SHAPE.head_size)
    assert context.begin_NxGxQ is None
    np.testing.assert_array_equal(context.end_NxGxQ[:, 0, 0], LENGTHS)
    for p, length in enumerate(LENGTHS):
        alone = reference.hidden(params, SHAPE, PROMPTS[p, :length])
        np.testing.assert_allclose(hidden_PxSxD[p, :length], alone, atol=1e-5)
        np.testing.assert_allclose(last_PxD[p], alone[-1], atol=1e-5)


def test_packed_sequences_see_their_own_and_their_prefix():
    """Two sequences packed behind one another, each continuing its own prefix of the same document."""
    params, document, packed = random_params(POLICY, 0), PROMPTS[2], [RESPONSES[0, 0, :3], RESPONSES[0, 1, :2]]
    prefixes, segments = np.repeat([2, 5], [3, 2]), np.repeat([1, 2], [3, 2])
    positions = prefixes + np.array([0, 1, 2, 0, 1])

    @jax.jit
    def run(params):
        _, context, _ = prefill(POLICY, params, document[None], np.array([6], np.int32))
        context = context._replace(end_NxGxQ=prefixes[None, None])
        tokens = np.concatenate(packed)[None, None]
        return POLICY.apply({"params": params}, tokens, positions[None, None], (context,), segments[None, None])[0]

    ours, start = run(params)[0, 0], 0
    for tokens, prefix in zip(packed, (2, 5), strict=True):
        alone = reference.hidden(params, SHAPE, [*document[:prefix], *tokens])[prefix:]
        np.testing.assert_allclose(ours[start : start + len(tokens)], alone, atol=1e-5)
        start += len(tokens)


def test_remat_changes_neither_states_nor_gradients():
    params, weights = random_params(SHALLOW, 0), np.random.default_rng(4).standard_normal((3, 6, SHAPE.width))

    @jax.jit
    def both(params):
        def loss(params, policy):
            return jnp.sum(prefill(policy, params, PROMPTS, LENGTHS)[0] * weights)

        return [jax.value_and_grad(loss)(params, SHALLOW.clone(remat=remat)) for remat in ("none", "dots", "full")]

    (value, grads), *others = both(params)
    for value_remat, grads_remat in others:
        np.testing.assert_allclose(value, value_remat, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, grads_remat)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(grads)), "a parameter is not used"


@pytest.mark.parametrize("name", VARIANTS)
def test_shape_counts_its_parameters(name):
    params = random_params(Transformer(VARIANTS[name]), 0)
    assert VARIANTS[name].parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    matrices = [leaf for name, leaf in params["layers"].items() if "norm" not in name and "bias" not in name]
    matrices.append(head(Transformer(VARIANTS[name]), params).matrix_VxD)
    assert VARIANTS[name].matmul_parameters == sum(leaf.size for leaf in matrices)


def test_presets():
    assert preset("tiny") is PRESETS["tiny"]
    assert 14.7e9 < preset("qwen2.5-14b").parameters < 14.8e9  # "14.7B" on its model card.
    for shape in PRESETS.values():
        assert shape.heads % shape.kv_heads == 0 and shape.head_size % 2 == 0
    with pytest.raises(UserError, match="policy.preset='tinny'.*Did you mean 'tiny'"):
        preset("tinny")


# --- its parts ---------------------------------------------------------------------------------------


def test_rms_norm():
    x, scale = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32) * 5, np.linspace(0.5, 2, 8)
    np.testing.assert_allclose(rms_norm(x, scale, 1e-6), reference.rms_norm(x, scale, 1e-6), rtol=1e-5)
    tiny = np.full((1, 8), 1e-4, np.float32)
    np.testing.assert_allclose(rms_norm(tiny, scale, 1e-6), reference.rms_norm(tiny, scale, 1e-6), rtol=1e-5)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    # 300 squared and summed 300 times over is nothing that 8 bits of mantissa can add up.
    x = jnp.full((1, 300), 300.0, jnp.bfloat16).at[0, 0].set(-300)
    normed = rms_norm(x, jnp.ones(300), 1e-6)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normed, np.sign(x))


def test_rotary_equals_a_complex_rotation():
    x = np.random.default_rng(0).standard_normal((1, 2, 1, 9, 6)).astype(np.float32)
    cos, sin = rotary_angles(np.arange(9)[None, None], 6, 10_000.0)
    assert cos.shape == (1, 1, 1, 9, 3)
    np.testing.assert_allclose(rotate(x, cos, sin), reference.rotate(x, 10_000.0), atol=1e-5)


def test_rotary_tells_late_positions_apart():
    """bfloat16 rounds 257 to 256: positions must stay integers until they are float32."""
    cos, sin = rotary_angles(jnp.array([[[256, 257, 8191]]]), 2, 10_000.0)
    np.testing.assert_allclose(cos[0, 0, 0, :, 0], np.cos([256, 257, 8191]), atol=1e-5)
    np.testing.assert_allclose(sin[0, 0, 0, :, 0], np.sin([256, 257, 8191]), atol=1e-5)


# --- to disk and back --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return {variant: (directory, parameters)}."""
    root = tmp_path_factory.mktemp("policies")
    (root / "tokenizer.model").write_bytes(b"a tokenizer")
    policies = {}
    for name, shape in VARIANTS.items():
        params = random_params(Transformer(shape), 5)
        save_policy(root / name, shape, params, root / "tokenizer.model", f"sha of {name}")
        policies[name] = root / name, params
    return policies


@pytest.mark.parametrize("name", VARIANTS)
def test_save_and_load_is_exact(saved, name):
    directory, params = saved[name]
    shape, loaded, fingerprint = load_policy(directory)
    assert (shape, fingerprint) == (VARIANTS[name], f"sha of {name}") == load_model_config(directory)
    assert same_trees(loaded, params)
    assert (directory / "tokenizer.model").read_bytes() == b"a tokenizer"


def hugging_face_logits(directory, tokens) -> np.ndarray:
    """The forward pass of Hugging Face's Llama and Qwen classes on the exported files, transcribed to NumPy."""
    config = json.loads((directory / "config.json").read_text())
    w = {name: tensor.astype(np.float64) for name, tensor in load_file(directory / WEIGHTS).items()}
    eps, heads, kv_heads = config["rms_norm_eps"], config["num_attention_heads"], config["num_key_value_heads"]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = {name.removeprefix(f"model.layers.{i}."): t for name, t in w.items() if f"layers.{i}." in name}
        y = reference.rms_norm(x, layer["input_layernorm.weight"], eps)

        def project(kind, count, layer=layer, y=y):
            out = y @ layer[f"self_attn.{kind}_proj.weight"].T + layer.get(f"self_attn.{kind}_proj.bias", 0)
            out = out.reshape(len(y), count, config["head_dim"])
            norm = layer.get(f"self_attn.{kind}_norm.weight")
            return (out if norm is None else reference.rms_norm(out, norm, eps)).swapaxes(0, 1)

        q = reference.rotate(project("q", heads), config["rope_theta"])
        k = np.repeat(reference.rotate(project("k", kv_heads), config["rope_theta"]), heads // kv_heads, axis=0)
        v = np.repeat(project("v", kv_heads), heads // kv_heads, axis=0)
        out = np.concatenate([reference.causal_attention(q[h], k[h], v[h]) for h in range(heads)], axis=-1)
        x = x + out @ layer["self_attn.o_proj.weight"].T
        y = reference.rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        gate = y @ layer["mlp.gate_proj.weight"].T
        up = y @ layer["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    x = reference.rms_norm(x, w["model.norm.weight"], eps)
    return x @ w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


@pytest.mark.parametrize("name", VARIANTS)
def test_the_exported_tensors_mean_what_hugging_face_reads(saved, name):
    directory, params = saved[name]
    theirs = hugging_face_logits(directory, PROMPTS[2])
    np.testing.assert_allclose(theirs, reference.logits(params, VARIANTS[name], PROMPTS[2]), atol=1e-9)


@pytest.fixture
def copy(saved, tmp_path):
    """Return a directory of the qwen2 variant that a test may spoil, and a function that rewrites its tensors."""
    directory, params = saved["qwen2"]
    save_policy(tmp_path, VARIANTS["qwen2"], params, directory / "tokenizer.model", "sha")

    def rewrite(change):
        tensors = load_file(tmp_path / WEIGHTS)
        change(tensors)
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, tmp_path / WEIGHTS)

    return tmp_path, rewrite


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(K_PROJ), rf"{WEIGHTS} lacks the tensor {K_PROJ}"),
        (lambda t: t.update({K_PROJ: t[K_PROJ].T}), rf"{K_PROJ} has shape \(16, 32\), expected \(32, 16\)"),
        (lambda t: t[K_PROJ].__setitem__((3, 2), np.nan), f"{K_PROJ} holds NaN"),
        (lambda t: t[K_PROJ].__setitem__((3, 2), -np.inf), f"{K_PROJ} holds NaN or infinity"),
        (lambda t: t.update({"lm_head.bias": t["model.norm.weight"]}), "no place for: lm_head.bias"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["model.norm.weight"]}), "no place for: model.lay"),
    ],
    ids=["missing", "wrong shape", "NaN", "infinity", "surplus", "a layer too many"],
)
def test_tensors_that_do_not_fit(copy, change, message):
    directory, rewrite = copy
    rewrite(change)
    with pytest.raises(UserError, match=message):
        load_policy(directory)


@pytest.mark.parametrize("kept", [0, 6, 200, -4])
def test_truncated_weights(copy, kept):
    directory, _ = copy
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[:kept])
    with pytest.raises(UserError, match=f"{WEIGHTS} cannot be read"):
        load_policy(directory)


def test_missing_weights(copy):
    directory, _ = copy
    (directory / WEIGHTS).unlink()
    with pytest.raises(UserError, match=WEIGHTS):
        load_policy(directory)


def test_config_that_cannot_be_used(copy):
    directory, _ = copy
    path = directory / "config.json"
    config = json.loads(path.read_text())

    def refused(text, message):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_model_config(directory)

    refused(path.read_text()[:-20], "config.json is not valid JSON")
    refused(
        json.dumps(config | {"model_type": "gpt2"}),
        "config.json: model_type='gpt2' is not among the architectures of rpt_jax: 'llama' .Llama 3",
    )
    refused(json.dumps({k: v for k, v in config.items() if k != "model_type"}), "model_type=None")
    refused(
        json.dumps(config | {"rope_scaling": {"type": "yarn"}}), "config.json: rope_scaling with rope_type='yarn' la"
    )
    refused(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}), "config.json.*hidden_size")
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        load_model_config(directory)
    path.unlink()
    with pytest.raises(UserError, match="no config.json"):
        load_model_config(directory)
    with pytest.raises(UserError, match="no config.json"):
        load_policy(directory / "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": 0},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"intermediate_size": 24.5},
        {"head_dim": 7},
        {"rope_theta": None},
        {"rms_norm_eps": "small"},
    ],
    ids=str,
)
def test_config_with_impossible_sizes(copy, change):
    directory, _ = copy
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="config.json"):
        load_policy(directory)


def test_config_that_is_no_object(copy):
    directory, _ = copy
    for text in ("[]", "3", "null"):
        (directory / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json"):
            load_model_config(directory)


def test_head_size_may_be_left_to_the_width(copy):
    """Llama's config.json leaves head_dim out, or null: then it is the width over the heads."""
    directory, _ = copy
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for absent in ({k: v for k, v in config.items() if k != "head_dim"}, config | {"head_dim": None}):
        path.write_text(json.dumps(absent))
        assert load_model_config(directory)[0].head_size == SHAPE.width // SHAPE.heads


def test_tensors_are_checked_against_the_config(copy):
    directory, _ = copy
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 47}))
    with pytest.raises(UserError, match=r"model.embed_tokens.weight has shape \(48, 16\), expected \(47, 16\)"):
        load_policy(directory)
