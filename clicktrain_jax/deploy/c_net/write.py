"""A net as C: ``net.c`` and ``net.h``, and ``net.weights`` where the weights are too many for a compiler."""

import importlib.resources
from collections.abc import Mapping

import numpy as np

from clicktrain_jax.deploy.c_net import lanes, simple, tiles
from clicktrain_jax.deploy.c_net.fuse import fuse
from clicktrain_jax.deploy.c_net.graph import read
from clicktrain_jax.deploy.c_net.layouts import VECTOR, round_up
from clicktrain_jax.deploy.c_net.nodes import Input
from clicktrain_jax.deploy.c_net.plan import Program, plan
from clicktrain_jax.deploy.c_net.source import Source, lines
from clicktrain_jax.deploy.inference import InferenceNet

C, HEADER, WEIGHTS = "net.c", "net.h", "net.weights"
# More weights than these stand in a file of their own.
_MOST_IN_SOURCE = 1 << 21

_EMIT = {
    "input": simple.image,
    "tiles": tiles.emit,
    "lanes": lanes.emit,
    "pool": simple.pool,
    "lane_pool": lanes.pool,
    "entrywise": simple.entrywise,
    "gather": simple.gather,
    "total": simple.total,
    "to_lanes": simple.to_lanes,
    "to_rows": simple.to_rows,
}


def to_c(net: InferenceNet, *, most_in_source: int = _MOST_IN_SOURCE) -> Mapping[str, bytes]:
    """Write a net as C11 for gcc and clang, with no dependency but libm.

    It takes one image a call: uint8 where the net normalises, float32 as its function takes it otherwise. Everything is
    computed in float32.

    Args:
        net: of the export.
        most_in_source: weights that may stand in the source itself; more go into a file of their own, which the
            program reads once.

    Returns:
        ``{"net.c", "net.h"}`` and, where there are many weights, ``"net.weights"``: the files.

    Raises:
        ValueError: a step that has no form in C; it is named, with what to do.
    """
    program = plan(fuse(read(net)))
    source = Source()
    for index, step in enumerate(program.steps):
        kind = step.kind if step.kind not in ("tiles", "lanes") else "convolution"
        name = f"{kind}_{index}"
        if step.node.__class__ is not Input or step.kind == "input":
            _EMIT[step.kind](source, step, name)
            simple.margin(source, step, name)
    weights = source.all_weights()
    is_apart = len(weights) > most_in_source
    files = {HEADER: _header(program, is_apart), C: _source(program, source, weights, is_apart)}
    encoded = {name: text.encode() for name, text in files.items()}
    if is_apart:
        encoded[WEIGHTS] = weights.astype("<f4").tobytes()
    return encoded


def _header(program: Program, is_apart: bool) -> str:
    image = program.graph.nodes[0]
    height, width, channels = image.shape
    has_pixels = isinstance(image, Input) and image.table is not None
    pixel = "uint8_t" if has_pixels else "float"
    what = "8-bit pixels; they are normalised inside" if has_pixels else "numbers as the net's own function takes them"
    load = ""
    if is_apart:
        load = f"""
/* Read the weights, once, before anything is run. path: of {WEIGHTS}. Returns 0, or -1 if the file cannot be read or
   is not that of this net. */
int net_load(const char *path);
"""
    return f"""/* A net, written by clicktrain_jax. C11, gcc or clang:
   cc -std=c11 -O3 -march=native -c net.c        (link with -lm; add -fopenmp for threads) */
#ifndef CLICKTRAIN_NET_H
#define CLICKTRAIN_NET_H
#include <stdint.h>

#define NET_HEIGHT {height}
#define NET_WIDTH {width}
#define NET_CHANNELS {channels}
#define NET_CLASSES {len(program.graph.where)}
#define NET_WORKSPACE_BYTES {4 * round_up(program.workspace, VECTOR)}

typedef {pixel} net_pixel;

#ifdef __cplusplus
extern "C" {{
#endif
{load}
/* image: NET_HEIGHT * NET_WIDTH * NET_CHANNELS {what},
   row by row, channels side by side. logits: room for NET_CLASSES floats.
   The workspace is the program's own: one call at a time. */
void net_run(const net_pixel *image, float *logits);

/* The same with a workspace of the caller's, NET_WORKSPACE_BYTES bytes, aligned to 64; what is in it does not matter.
   Calls with different workspaces may run at the same time. */
void net_run_in(const net_pixel *image, float *logits, void *workspace);

#ifdef __cplusplus
}}
#endif
#endif
"""


def _source(program: Program, source: Source, weights: np.ndarray, is_apart: bool) -> str:
    runtime = importlib.resources.files("clicktrain_jax.deploy.c_net").joinpath("runtime.c").read_text("utf-8")
    places = program.output.places(program.graph.where)
    logits = source.table("logit_places", places, "int32_t")
    body = "\n".join(f"  {statement}" for statement in source.body)
    result = f"m[{program.output.offset} + {logits}[i]]"
    if (places < 0).any():
        result = f"{logits}[i] < 0 ? 0.0f : {result}"
    return f"""/* A net, written by clicktrain_jax; see {HEADER}. */
#include "{HEADER}"
#include <math.h>
#include <stddef.h>
{"#include <stdio.h>" + chr(10) if is_apart else ""}#include <string.h>

{runtime}
{_weights(weights, is_apart)}
{"".join(source.parts)}
void net_run_in(const net_pixel *image, float *logits, void *workspace) {{
  float *m = workspace;
{body}
  for (int i = 0; i < NET_CLASSES; ++i) logits[i] = {result};
}}

void net_run(const net_pixel *image, float *logits) {{
  static float workspace[NET_WORKSPACE_BYTES / sizeof(float)] NET_ALIGNED;
  net_run_in(image, logits, workspace);
}}
"""


def _weights(weights: np.ndarray, is_apart: bool) -> str:
    if not is_apart:
        bits = lines(f"0x{word:x}" for word in weights.view(np.uint32).tolist())
        return f"""static const union {{
  uint32_t bits[{len(weights)}];
  float floats[{len(weights)}];
}} net_weights NET_ALIGNED = {{{{
{bits}}}}};
#define NET_WEIGHTS net_weights.floats
"""
    return f"""static float net_weights[{len(weights)}] NET_ALIGNED;
#define NET_WEIGHTS net_weights

int net_load(const char *path) {{
  FILE *file = fopen(path, "rb");
  if (!file) return -1;
  uint32_t sum = 0;
  const size_t count = fread(net_weights, sizeof(float), {len(weights)}, file);
  const int is_longer = fgetc(file) != EOF;
  fclose(file);
  for (size_t i = 0; i < count; ++i) {{
    uint32_t bits;
    memcpy(&bits, net_weights + i, sizeof bits);
    sum = (sum ^ bits) * 16777619u;
  }}
  return count == {len(weights)} && !is_longer && sum == {_sum(weights)}u ? 0 : -1;
}}
"""


def _sum(weights: np.ndarray) -> int:
    """Of all bits in their order, as the C computes it."""
    total = 0
    for bits in weights.view(np.uint32).tolist():
        total = (total ^ bits) * 16777619 & 0xFFFFFFFF
    return total
