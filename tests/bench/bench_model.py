"""A forward of FLUX.1's transformer, a decoding of its autoencoder and T5's encoder at their published widths: `atelier bench model` beside diffusers and
transformers, by turns. Weights are random on both sides."""

import gc

import sides  # first: it sets how memory is kept
import torch

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def flux(options, side, dtype):
    """The network, and its inputs: one picture of side x side pixels with guidance."""
    from diffusers import FluxTransformer2DModel

    grid, width, text = side // 16, 4096, options.text_tokens
    with made(dtype):
        model = FluxTransformer2DModel(
            num_layers=options.blocks,
            num_single_layers=options.single_blocks,
            num_attention_heads=24,
            attention_head_dim=128,
            joint_attention_dim=width,
            guidance_embeds=True,
        )
    places = torch.arange(grid * grid)
    inputs = {
        "hidden_states": torch.randn(1, grid * grid, 64, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, width, dtype=dtype),
        "pooled_projections": torch.randn(1, 768, dtype=dtype),
        "timestep": torch.tensor([0.75], dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=torch.float32),
        "img_ids": torch.stack([torch.zeros_like(places), places // grid, places % grid], 1).float(),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }
    return model.eval(), inputs


def t5(options, _side, dtype):
    """The network, and one text."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32_128,
        d_model=4096,
        d_kv=64,
        d_ff=10_240,
        num_layers=options.t5_blocks,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with made(dtype):
        model = T5EncoderModel(config)
    return model.eval(), {"input_ids": (torch.arange(options.text_tokens) * 7919 % 32_000)[None]}


def vae(_options, side, dtype):
    """FLUX.1's, and the latents of one picture."""
    from diffusers import AutoencoderKL

    with made(dtype):
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    model = model.eval().to(memory_format=torch.channels_last)
    return model.decode, {"z": torch.randn(1, 16, side // 8, side // 8, dtype=dtype).to(memory_format=torch.channels_last)}


def sd15(options, side, dtype):
    """Stable Diffusion 1.5's U-Net, and the latents of one picture."""
    return unet(side, dtype, cross_attention_dim=768, attention_head_dim=8)


def sdxl(options, side, dtype):
    """XL's."""
    network = unet(
        side,
        dtype,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    told = torch.tensor([[side, side, 0, 0, side, side]], dtype=dtype)
    network[1]["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 1280, dtype=dtype), "time_ids": told}
    return network


def unet(side, dtype, **config):
    """A U-Net and its inputs."""
    from diffusers import UNet2DConditionModel

    with made(dtype):
        model = UNet2DConditionModel(**config)
    model = model.eval().to(memory_format=torch.channels_last)
    latents = torch.randn(1, 4, side // 8, side // 8, dtype=dtype).to(memory_format=torch.channels_last)
    text = torch.randn(1, 77, config["cross_attention_dim"], dtype=dtype)
    return model, {"sample": latents, "timestep": 500, "encoder_hidden_states": text, "return_dict": False}


class made:
    """What is made inside has weights of this type from the start."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(self.before)


def works(options):
    """(name, maker of PyTorch's, side, Atelier's arguments) of each row."""
    text = ["--text-tokens", options.text_tokens]
    if "flux" in options.family:
        blocks = ["--blocks", options.blocks, "--single-blocks", options.single_blocks]
        for side in options.side:
            name = f"FLUX.1, {options.blocks} + {options.single_blocks} blocks, {side} px"
            yield name, flux, side, ["--family", "flux", *blocks, "--side", side, *text]
    if "vae" in options.family:
        for side in options.side:
            yield f"FLUX.1's autoencoder, decoding {side} px", vae, side, ["--family", "vae", "--side", side]
    for name, family, make in [("1.5", "sd15", sd15), ("XL", "sdxl", sdxl)]:
        for side in options.side if family in options.family else []:
            yield f"Stable Diffusion {name}'s U-Net, {side} px", make, side, ["--family", family, "--side", side]
    if "t5" in options.family:
        name = f"T5-XXL, {options.t5_blocks} blocks, {options.text_tokens} tokens"
        yield name, t5, None, ["--family", "t5", "--blocks", options.t5_blocks, *text]


def measure(options, work, weights):
    """Rounds of Atelier and PyTorch with weights of one type; the best forward of each, in seconds."""
    name, make, side, arguments = work
    products = weights == "bf16" and sides.fastest_bf16() or "f32"
    atelier, peer, faults = float("inf"), float("inf"), 0
    model, inputs = make(options, side, TYPES[weights])
    for _ in range(options.rounds):
        atelier = min(atelier, sides.forward(options, arguments, weights, products))
        for _ in range(options.steps):
            before = sides.page_faults()
            peer = min(peer, sides.seconds(lambda: model(**inputs)))
            faults = sides.page_faults() - before
    del model
    gc.collect()
    row = {"network": name, "weights": weights, "atelier s": atelier, "torch s": peer, "torch / atelier": peer / atelier}
    return {**row, "torch faults": faults}


def main():
    """See README.md."""
    about = "Atelier's networks beside PyTorch's, by turns. Seconds; a ratio over 1 says that Atelier is faster."
    parser = sides.network_parser(about, TYPES, others=["sd15", "sdxl"])
    parser.add_argument("--t5-blocks", type=sides.positive, default=2)
    parser.add_argument("--text-tokens", type=sides.positive, default=512)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = [("network", 40, ""), ("weights", 8, ""), ("atelier s", 11, ".3f"), ("torch s", 11, ".3f")]
    report = sides.Report(options, [*columns, ("torch / atelier", 17, ".2f"), ("torch faults", 14, "d")], torch=torch.__version__)
    with torch.inference_mode():
        for work in works(options):
            for weights in options.weights:
                report.row(measure(options, work, weights))
    report.end()


if __name__ == "__main__":
    main()
