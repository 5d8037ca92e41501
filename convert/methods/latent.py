"""Latent attention (MLA) from ordinary attention.

Three steps, of which the first is exact. The keys of each RoPE plane are mixed across heads into
components (see ``mixing``). Cut: a few components become the pairs of the one rotary key that all
heads share; the others lose their rotation, for which the constant that comes nearest to it takes
its place. Factor: all keys without rotation and all values become linear maps of one latent, chosen
so that what reaches the residual stream loses the least. Constants are free: of a key no softmax
sees them, and those of the values go to the output's bias.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.layer import AttentionLayer, LatentGeometry, LatentLayer
from convert.methods.halves import gram, mirrored, times_lower
from convert.methods.mixing import Mixed, Rows
from convert.methods.spectral import leading, lower_root
from convert.planes import planes_of

__all__ = [
    "Factored",
    "embedded",
    "factored",
    "latent_form",
    "output_bias",
    "readers",
    "rotary_key",
    "still_keys",
    "value_gram",
    "with_idle_pairs",
]

_FLOOR = 1e-12  # of the norm of the inputs' second moment


@dataclass(frozen=True, slots=True)
class Factored:
    """A latent and what becomes of it.

    Args:
        latent: [R, E]; of inputs as they were measured it is white.
        k_up: [H, Dn, R].
        v_up: [Hkv, Dv, R].
        v_constant: [Hkv, Dv] what the mean input adds to the values.
        kept: [R] what each dim of the latent keeps of the energy, the largest first.
        energy: Of all keys and values.
    """

    latent: Tensor
    k_up: Tensor
    v_up: Tensor
    v_constant: Tensor
    kept: Tensor
    energy: float

    @property
    def lost(self) -> float:
        """Energy that the latent leaves out."""
        return max(0.0, self.energy - float(self.kept.sum()))


@dataclass(frozen=True, slots=True)
class RotaryKey:
    """The components of keys that stay rotary, as pairs of one key.

    Args:
        rows: [Dr, E'].
        maps: [Hkv, Dr / 2] complex, as of ``Mixed``.
        planes: [Dr / 2] plane of each pair.
    """

    rows: Tensor
    maps: Tensor
    planes: Tensor


def still_keys(rows: Rows, mixed: Mixed, turn: Tensor, kept: Tensor, factor: float) -> Tensor:
    """Keys [H, D, E'] of each query head without rotation and without the components kept.

    Args:
        rows: Of the layer.
        mixed: Its keys as components.
        turn: [H, P, n] complex constants in place of the rotation.
        kept: [P, n] true where a component is a pair of the rotary key.
        factor: Square of the factor that the rotation has.
    """
    group = len(rows.q) // len(rows.k)
    maps = mixed.maps.repeat_interleave(group, 0) * turn * factor
    found = torch.einsum("hpj,pje->hpe", maps.masked_fill(kept, 0), mixed.rows)
    pairs = torch.stack([found.real, found.imag], 2).flatten(1, 2)
    rest = rows.k[:, 2 * rows.planes :].repeat_interleave(group, 0)
    return torch.cat([pairs, rest], 1)


def factored(
    keys: Tensor,
    values: Tensor,
    *,
    key_metric: Tensor,
    value_gram: Tensor,
    moment: Tensor,
    rank: int,
    centred: bool = True,
) -> Factored:
    """The latent that keeps the most of keys and values.

    Minimises ``sum_h E|L_h^T (k_h - K_h c)|^2 + E(v - V c)^T M (v - V c)`` over the latent
    ``c = B x`` and its maps K, V, where ``key_metric = L L^T`` and M is ``value_gram``. For a given
    latent the best maps are its regressions, whatever the metric, so the metric chooses directions
    of the input alone.

    Args:
        keys: [H, D, E'].
        values: [Hkv, Dv, E'].
        key_metric: [H, D, D].
        value_gram: [Hkv * Dv, Hkv * Dv].
        moment: [E', E'] second moment of [x; 1].
        rank: R.
        centred: Leave constants out of the latent.
    """
    power, mean = moment[:-1, :-1], moment[:-1, -1] if centred else 0 * moment[:-1, -1]
    # inputs that are always zero have no variance: then any will do
    floor = _FLOOR * float(power.norm()) or 1.0
    root = lower_root(power - mean[:, None] * mean, floor)
    read_keys, read_values = times_lower(keys[..., :-1], root), times_lower(values[..., :-1], root)
    flat = read_values.flatten(0, 1)
    whole = mirrored(read_keys.flatten(0, 1), (key_metric @ read_keys).flatten(0, 1))
    whole += mirrored(flat, value_gram @ flat)
    kept, top = leading(whole, rank)
    v_up = read_values @ top
    latent = torch.linalg.solve_triangular(root.mT, top, upper=True).mT
    constant = values[..., :-1] @ mean + values[..., -1] - v_up @ (latent @ mean)
    return Factored(latent, read_keys @ top, v_up, constant, kept, float(whole.trace()))


def value_gram(layer: AttentionLayer, together: Tensor) -> Tensor:
    """[Hkv * Dv, Hkv * Dv] what errors of the values add up to in the residual stream.

    Args:
        layer: Its output projection.
        together: [H, H] how much two heads read the same tokens; see ``Attended.values``.
    """
    geometry = layer.geometry
    o = _wide(layer.o)
    heads = (geometry.heads, geometry.value_dim)
    errors = gram(o.flatten(1)).view(*heads, *heads) * together[:, None, :, None]
    members = (geometry.kv_heads, geometry.group, geometry.value_dim)
    summed = errors.reshape(*members, *members).sum((1, 4))
    width = geometry.kv_heads * geometry.value_dim
    return summed.reshape(width, width)


def latent_form(
    layer: AttentionLayer,
    rows: Rows,
    mixed: Mixed,
    *,
    kept: Tensor,
    factored: Factored,
    scale: float,
) -> LatentLayer:
    """The latent layer of a cut and a factorisation, in float64.

    Args:
        layer: The original.
        rows: Its rows.
        mixed: Its keys as components.
        kept: [P, n] true where a component is a pair of the rotary key.
        factored: The rest.
        scale: Factor on its scores.
    """
    own, key = readers(layer), rotary_key(mixed, kept)
    asked = rows.turning_q[:, key.planes]
    q = torch.cat([rows.q, _pairs(key.maps[own].conj()[..., None] * asked, 1)], 1)
    return LatentLayer(
        geometry=layer.geometry.latent(len(factored.latent), len(key.rows)),
        q=q[..., :-1],
        latent=factored.latent,
        k_rope=key.rows[:, :-1],
        k_up=factored.k_up,
        v_up=factored.v_up[own],
        o=_wide(layer.o),
        q_bias=None if layer.q_bias is None else q[..., -1],
        k_rope_bias=None if layer.k_bias is None else key.rows[:, -1],
        o_bias=output_bias(layer, factored.v_constant[own]),
        planes=tuple(key.planes.tolist()),
        scale=scale,
    )


def rotary_key(mixed: Mixed, kept: Tensor) -> RotaryKey:
    """The rotary key of the components where ``kept`` [P, n] is true."""
    planes, component = kept.nonzero(as_tuple=True)
    rows = _pairs(mixed.rows[planes, component], 0)
    return RotaryKey(rows, mixed.maps[:, planes, component], planes)


def readers(layer: AttentionLayer) -> Tensor:
    """[H] the KV head that each query head reads."""
    return torch.arange(layer.geometry.heads) // layer.geometry.group


def output_bias(layer: AttentionLayer, constants: Tensor) -> Tensor | None:
    """[E] of the output with the constants [H, Dv] of the values; None if there are none at all.

    A bias of zeros would be refitted, and not every result has a place for one.
    """
    if layer.o_bias is None and not constants.any():
        return None
    bias = torch.einsum("ehd,hd->e", _wide(layer.o), constants)
    return bias if layer.o_bias is None else bias + layer.o_bias.double()


def with_idle_pairs(layer: LatentLayer, planes: tuple[int, ...]) -> LatentLayer:
    """A layer without positions, with rotary pairs that are zero, as others of its model have."""
    width, sizes = 2 * len(planes), layer.geometry
    query = layer.q.new_zeros(sizes.heads, width, sizes.hidden)
    if layer.q_rope is not None:
        return dataclasses.replace(
            layer,
            geometry=dataclasses.replace(sizes, rope_dim=width),
            q_rope=layer.q.new_zeros(sizes.heads, width, sizes.nope_dim),
            k_rope=query[0],
            k_rope_bias=query[0, :, 0],
            planes=planes,
        )
    bias = None if layer.q_bias is None else torch.cat([layer.q_bias, query[..., 0]], 1)
    return dataclasses.replace(
        layer,
        geometry=dataclasses.replace(sizes, rope_dim=width),
        q=torch.cat([layer.q, query], 1),
        q_bias=bias,
        k_rope=query[0],
        k_rope_bias=None if layer.k_rope_bias is None else query[0, :, 0],
        planes=planes,
    )


def _pairs(rows: Tensor, dim: int) -> Tensor:
    """Complex rows as pairs (2i, 2i + 1) of real ones along ``dim``."""
    return torch.stack([rows.real, rows.imag], dim + 1).flatten(dim, dim + 1)


def embedded(layer: AttentionLayer, scale: float) -> LatentLayer:
    """The same function as a latent layer, without any loss.

    Args:
        layer: With q, k, v, o and ``rope``; without query/key norms and clamps.
        scale: Factor on its scores.

    Returns:
        A layer of rank ``Hkv * (D - rope.dim + Dv)`` with ``Hkv * rope.dim`` rotary dims, float64.
        Key biases of dims without RoPE are left out, since no softmax sees them; value biases
        are in the output's.
    """
    geometry, rope = layer.geometry, layer.rope
    assert rope is not None
    q, k, v, o = (_wide(getattr(layer, part)) for part in ("q", "k", "v", "o"))
    heads, kv_heads = geometry.heads, geometry.kv_heads
    planes = planes_of(rope, geometry.head_dim)
    turning = torch.stack([planes.first, planes.second], 1).flatten()
    still, turned, value = len(planes.rest), len(turning), geometry.value_dim
    own = readers(layer)

    def placed(rows: Tensor) -> Tensor:
        """Query rows [H, turned, ...] in the dims of their KV head, zeros in all others."""
        wide = rows.new_zeros(heads, kv_heads, *rows.shape[1:])
        wide[torch.arange(heads), own] = rows
        return wide.flatten(1, 2)

    def query(rows: Tensor) -> Tensor:
        return torch.cat([rows[:, planes.rest], placed(rows[:, turning])], 1)

    rank = kv_heads * (still + value)
    up = torch.eye(rank, dtype=q.dtype)
    k_up = up[: kv_heads * still].view(kv_heads, still, rank)[own]
    v_up = up[kv_heads * still :].view(kv_heads, value, rank)[own]
    o_bias = None if layer.o_bias is None else layer.o_bias.double()
    if layer.v_bias is not None:
        shift = torch.einsum("ehd,hd->e", o, layer.v_bias.double()[own])
        o_bias = shift if o_bias is None else o_bias + shift
    return LatentLayer(
        geometry=LatentGeometry(
            hidden=geometry.hidden,
            heads=heads,
            rank=rank,
            nope_dim=still,
            rope_dim=kv_heads * turned,
            value_dim=value,
        ),
        q=query(q),
        latent=torch.cat([k[:, planes.rest].flatten(0, 1), v.flatten(0, 1)]),
        k_rope=k[:, turning].flatten(0, 1),
        k_up=k_up,
        v_up=v_up,
        o=o,
        q_bias=None if layer.q_bias is None else query(layer.q_bias.double()),
        k_rope_bias=None if layer.k_bias is None else layer.k_bias.double()[:, turning].flatten(),
        o_bias=o_bias,
        planes=tuple(range(turned // 2)) * kv_heads,
        scale=scale,
    )


def _wide(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.double()
