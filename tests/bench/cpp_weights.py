"""Weights for stable-diffusion.cpp that were never trained, in GGUF and by their published names: FLUX.1's transformer with any number
of blocks, its autoencoder's decoder, CLIP-L and T5-XXL. Numbers repeat after a prime number of blocks, as `atelier bench model`'s do."""

import math
import random
import struct

ALIGNMENT = 32
# Blocks of the pattern.
PATTERN = 8209


def f32(number):
    """Near zero."""
    return struct.pack("<f", number.gauss(0, 0.02))


def f16(number):
    """The same."""
    return struct.pack("<e", number.gauss(0, 0.02))


def bf16(number):
    """The upper half of an f32."""
    return f32(number)[2:]


def q8_0(number):
    """A scale and 32 numbers of 8 bits."""
    return struct.pack("<e", 0.0003) + number.randbytes(32)


def q4_k(number):
    """A scale and one for what is taken off, then of 8 parts both in 6 bits, and 256 numbers of 4 bits: their mean is zero."""
    return struct.pack("<ee", 0.0001, 0.00075) + number.randbytes(12 + 128)


# Of each type: its number in a GGUF file, numbers of a block, and what makes one.
TYPES = {"f32": (0, 1, f32), "f16": (1, 1, f16), "q8_0": (8, 32, q8_0), "q4_k": (12, 256, q4_k), "bf16": (30, 1, bf16)}


def affine(name, d_out, *d_in):
    """A layer's weight and bias."""
    return [(f"{name}.weight", (d_out, *d_in)), (f"{name}.bias", (d_out,))]


def flux(blocks, single_blocks):
    """FLUX.1 [dev]'s transformer."""
    d, head = 3072, 128
    shapes = affine("img_in", d, 64) + affine("txt_in", d, 4096)
    for name, width in [("time_in", 256), ("vector_in", 768), ("guidance_in", 256)]:
        shapes += affine(f"{name}.in_layer", d, width) + affine(f"{name}.out_layer", d, d)
    norms = []
    for i in range(blocks):
        for stream in [f"double_blocks.{i}.img", f"double_blocks.{i}.txt"]:
            shapes += affine(f"{stream}_mod.lin", 6 * d, d)
            shapes += affine(f"{stream}_attn.qkv", 3 * d, d) + affine(f"{stream}_attn.proj", d, d)
            shapes += affine(f"{stream}_mlp.0", 4 * d, d) + affine(f"{stream}_mlp.2", d, 4 * d)
            norms.append(f"{stream}_attn.norm")
    for block in [f"single_blocks.{i}" for i in range(single_blocks)]:
        shapes += affine(f"{block}.modulation.lin", 3 * d, d)
        shapes += affine(f"{block}.linear1", 7 * d, d) + affine(f"{block}.linear2", d, 5 * d)
        norms.append(f"{block}.norm")
    shapes += [(f"{norm}.{part}_norm.scale", (head,)) for norm in norms for part in ["query", "key"]]
    return shapes + affine("final_layer.adaLN_modulation.1", 2 * d, d) + affine("final_layer.linear", 64, d)


def vae():
    """The decoder of FLUX.1's autoencoder."""

    def resnet(name, c_in, c_out):
        shapes = affine(f"{name}.norm1", c_in) + affine(f"{name}.conv1", c_out, c_in, 3, 3)
        shapes += affine(f"{name}.norm2", c_out) + affine(f"{name}.conv2", c_out, c_out, 3, 3)
        return shapes + (affine(f"{name}.nin_shortcut", c_out, c_in, 1, 1) if c_in != c_out else [])

    before = 512
    shapes = affine("decoder.conv_in", before, 16, 3, 3)
    for i in [1, 2]:
        shapes += resnet(f"decoder.mid.block_{i}", before, before)
    shapes += affine("decoder.mid.attn_1.norm", before)
    for part in ["q", "k", "v", "proj_out"]:
        shapes += affine(f"decoder.mid.attn_1.{part}", before, before, 1, 1)
    for i, width in [(3, 512), (2, 512), (1, 256), (0, 128)]:
        for block in range(3):
            shapes += resnet(f"decoder.up.{i}.block.{block}", before, width)
            before = width
        if i > 0:
            shapes += affine(f"decoder.up.{i}.upsample.conv", width, width, 3, 3)
    return shapes + affine("decoder.norm_out", before) + affine("decoder.conv_out", 3, before, 3, 3)


def clip():
    """CLIP-L's text encoder."""
    d = 768
    shapes = [("embeddings.token_embedding.weight", (49_408, d)), ("embeddings.position_embedding.weight", (77, d))]
    for layer in [f"encoder.layers.{i}" for i in range(12)]:
        for part in ["q_proj", "k_proj", "v_proj", "out_proj"]:
            shapes += affine(f"{layer}.self_attn.{part}", d, d)
        shapes += affine(f"{layer}.mlp.fc1", 4 * d, d) + affine(f"{layer}.mlp.fc2", d, 4 * d)
        shapes += affine(f"{layer}.layer_norm1", d) + affine(f"{layer}.layer_norm2", d)
    return [(f"text_model.{name}", shape) for name, shape in shapes + affine("final_layer_norm", d)]


def t5():
    """T5-XXL's encoder, whole: stable-diffusion.cpp takes no other."""
    d, d_ff, heads = 4096, 10_240, 64
    shapes = [("shared.weight", (32_128, d)), ("encoder.final_layer_norm.weight", (d,))]
    shapes.append(("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, heads)))
    for layer in [f"encoder.block.{i}.layer" for i in range(24)]:
        shapes += [(f"{layer}.0.SelfAttention.{part}.weight", (d, d)) for part in "qkvo"]
        shapes += [(f"{layer}.1.DenseReluDense.{part}.weight", (d_ff, d)) for part in ["wi_0", "wi_1"]]
        shapes.append((f"{layer}.1.DenseReluDense.wo.weight", (d, d_ff)))
        shapes += [(f"{layer}.{i}.layer_norm.weight", (d,)) for i in [0, 1]]
    return shapes


def type_of(shape, wanted):
    """Of a tensor: convolutions are f16, and what is no matrix or does not come to whole blocks is f32."""
    if len(shape) == 4:
        return "f16"
    return wanted if len(shape) == 2 and shape[-1] % TYPES[wanted][1] == 0 else "f32"


def write(path, shapes, wanted):
    """Writes a checkpoint."""
    patterns, entries, infos, end = {}, [], [], 0
    for name, shape in shapes:
        kind = type_of(shape, wanted)
        number, length, make = TYPES[kind]
        if kind not in patterns:
            source = random.Random(0)
            patterns[kind] = b"".join(make(source) for _ in range(PATTERN))
        size = math.prod(shape) // length * (len(patterns[kind]) // PATTERN)
        info = struct.pack(f"<Q{len(name)}sI", len(name), name.encode(), len(shape))
        infos.append(info + struct.pack(f"<{len(shape)}QIQ", *reversed(shape), number, end))
        entries.append((patterns[kind], size))
        end += size + -size % ALIGNMENT
    with open(path, "wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(entries), 0) + b"".join(infos))
        file.write(bytes(-file.tell() % ALIGNMENT))
        for pattern, size in entries:
            for _ in range(size // len(pattern)):
                file.write(pattern)
            file.write(pattern[: size % len(pattern)] + bytes(-size % ALIGNMENT))
