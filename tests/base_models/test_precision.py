"""The two ends of a half-precision UNet in float32, against float64. Errors are in units of huber_c, 0.001."""

import copy
import pickle

import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler
from torch import nn

from diffusers_mcm import AnimateDiffMCMPipeline, MCMPipeline, MCMScheduler, ModelScopeMCMPipeline
from diffusers_mcm.base_models import get_base_model, precision
from diffusers_mcm.base_models.precision import InputConv2d, OutputConv2d, OutputGroupNorm, float32_ends
from tests.tiny import (
    ANIMATEDIFF_SCHEDULER,
    NUM_FRAMES,
    SCHEDULER,
    SIZE,
    TEXT_DIM,
    tiny_animatediff_components,
    tiny_components,
    tiny_motion_adapter,
    tiny_motion_unet,
    tiny_unet,
)

UNETS = {"modelscope": tiny_unet, "animatediff": tiny_motion_unet}
PATH = get_base_model("modelscope").noise_path(SCHEDULER)
T = torch.tensor([999, 999])
HUBER_C = 0.001
both = pytest.mark.parametrize("name", UNETS)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def latents(dtype=torch.float32):
    return torch.randn(2, 4, NUM_FRAMES, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def text(dtype=torch.float32):
    return {"prompt_embeds": torch.randn(2, 5, TEXT_DIM, generator=torch.Generator().manual_seed(1)).to(dtype)}


@torch.no_grad()
def denoise(name, unet, x=None):
    return get_base_model(name).denoise(unet, latents() if x is None else x, T, text(unet.dtype))


def x0_error(output, expected):
    """Mean error of x̂_0 at the last timestep."""
    x = latents().double()
    x0 = [PATH.predict_x0(each.double(), x, T) for each in (output, expected)]
    return float((x0[0] - x0[1]).abs().mean()) / HUBER_C


class Between:
    """What a half-precision network computes between its ends, and its own output with the last end in float64."""

    def __init__(self, unet):
        unet.conv_in.register_forward_hook(lambda _, inputs, output: setattr(self, "first", (*inputs, output)))
        unet.conv_norm_out.register_forward_pre_hook(lambda _, inputs: setattr(self, "last", inputs[0]))
        self.unet = unet

    def exact_output(self):
        norm, conv = (copy.deepcopy(each).double() for each in (self.unet.conv_norm_out, self.unet.conv_out))
        frames = conv(nn.functional.silu(norm(self.last.double())))
        return frames.unflatten(0, (2, NUM_FRAMES)).transpose(1, 2)


@both
def test_in_float32_and_wider_not_a_bit_changes(name):
    for dtype in (torch.float32, torch.float64):
        x, embeds = latents(dtype), text(dtype)["prompt_embeds"]
        repeated = embeds if name == "modelscope" else embeds.repeat_interleave(NUM_FRAMES, 0)
        with torch.no_grad():
            expected = UNETS[name]().to(dtype)(x, T, repeated).sample
        assert torch.equal(denoise(name, UNETS[name]().to(dtype), x), expected)


@both
@halves
def test_the_rounding_of_the_output_is_gone(name, dtype):
    """The network's own half-precision output costs x̂_0 several c, whatever it computed before; now it costs none."""
    unet = UNETS[name]().to(dtype)
    between = Between(unet)
    output = denoise(name, unet)
    assert output.dtype == torch.float32 and between.last.dtype == dtype
    with torch.no_grad():
        exact = between.exact_output()
        rounded_once = x0_error(exact.to(dtype), exact)
        assert rounded_once > {torch.bfloat16: 2, torch.float16: 0.2}[dtype]
        assert x0_error(output, exact) < 0.01


@both
@halves
def test_what_is_read_is_not_rounded_either(name, dtype):
    """x̂_0 is computed of the very latents that the network was given, so it has to see all of them."""
    unet = UNETS[name]().to(dtype)
    between = Between(unet)
    denoise(name, unet)
    read, features = between.first
    assert read.dtype == torch.float32 and features.dtype == dtype
    conv = copy.deepcopy(unet.conv_in).double()
    with torch.no_grad():
        exact, of_rounded = conv(read.double()), conv(read.to(dtype).double())
    error = (features.double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + 1e-7).all()  # one rounding, of the result
    assert ((of_rounded - exact).abs() > error).float().mean() > 0.1


@both
def test_under_autocast_too(name):
    for unet in (UNETS[name](), UNETS[name]().bfloat16()):  # as frozen networks are, and as they could be
        between = Between(unet)
        with torch.autocast("cpu", torch.bfloat16):
            output = denoise(name, unet)
        assert output.dtype == torch.float32
        with torch.no_grad():
            assert x0_error(output, between.exact_output()) < 0.01


@both
def test_gradients_pass_both_ends(name):
    """Against float64, for the network's input: through the first convolution and the last."""
    unet = UNETS[name]().bfloat16().requires_grad_(False)
    gradients = []
    for each in (unet, copy.deepcopy(unet).double()):
        x = latents(torch.promote_types(each.dtype, torch.float32)).requires_grad_()
        get_base_model(name).denoise(each, x, T, text(each.dtype)).square().sum().backward()
        gradients.append(x.grad.double())
    assert gradients[0].isfinite().all()
    assert nn.functional.cosine_similarity(*(each.flatten() for each in gradients), dim=0) > 0.999


@both
def test_the_network_is_left_as_it_was(name):
    """To others it is a stock UNet, in use and on disk; also after a call that failed."""
    stock, unet = (UNETS[name]().bfloat16() for _ in range(2))
    denoise(name, unet)
    with pytest.raises(RuntimeError, match="stopped"), float32_ends(unet):
        raise RuntimeError("stopped")
    embeds = text(torch.bfloat16)["prompt_embeds"]
    inputs = latents(torch.bfloat16), T, embeds if name == "modelscope" else embeds.repeat_interleave(NUM_FRAMES, 0)
    with torch.no_grad():
        expected = stock(*inputs).sample
        for each in (unet, copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
            result = each(*inputs).sample
            assert result.dtype == torch.bfloat16 and torch.equal(result, expected)
            assert torch.equal(denoise(name, each), denoise(name, stock))
    assert unet.state_dict().keys() == stock.state_dict().keys()
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}


def test_calls_in_several_threads_do_not_end_each_others_precision():
    unet = tiny_unet().bfloat16()
    with float32_ends(unet):
        with float32_ends(unet):
            pass
        assert unet.conv_out(torch.zeros(1, 8, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32
    assert unet.conv_out(torch.zeros(1, 8, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@both
@halves
@pytest.mark.parametrize("end", ["conv_in", "conv_out"])
def test_a_lora_on_an_end_is_computed_in_float32_too(name, dtype, end):
    """Its part is as large as the layer's own here: rounding either would cost x̂_0 several c."""
    from peft import LoraConfig, inject_adapter_in_model

    unet = UNETS[name]().to(dtype).requires_grad_(False)  # as PEFT leaves it: torch chooses its kernels by that, too
    plain = denoise(name, unet)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[end]), unet)
    assert torch.equal(denoise(name, unet), plain)  # a fresh LoRA adds nothing
    layer = getattr(unet, end)
    weights = torch.randn(layer.lora_B["default"].weight.shape, generator=torch.Generator().manual_seed(5))
    layer.lora_B["default"].weight.data = (0.5 * weights).to(dtype)
    seen = {}
    watch = layer.register_forward_hook(lambda _, inputs, output: seen.update(read=inputs[0], given=output))
    output = denoise(name, unet)
    watch.remove()
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(seen["read"].double())
        assert (exact - copy.deepcopy(layer.base_layer).double()(seen["read"].double())).norm() > 0.5 * exact.norm()
    if end == "conv_in":  # what goes on is in half precision, rounded from float32 at most twice
        error = (seen["given"].double() - exact).abs()
        assert seen["given"].dtype == dtype and (error <= torch.finfo(dtype).eps * (exact.abs() + 4)).all()
    else:
        exact = exact.unflatten(0, (2, NUM_FRAMES)).transpose(1, 2)
        assert x0_error(exact.to(dtype), exact) > {torch.bfloat16: 2, torch.float16: 0.2}[dtype]
        assert output.dtype == torch.float32 and x0_error(output, exact) < 0.01 * exact.abs().mean()
    assert layer.cast_input_dtype_enabled  # as PEFT has it, for other calls


def test_with_layers_kept_in_fewer_bits():
    unet = tiny_unet().bfloat16()
    expected = denoise("modelscope", unet)
    unet = tiny_unet().bfloat16()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    output = denoise("modelscope", unet)  # with weights of three bits, each up to 6 % off
    assert output.dtype == torch.float32 and (output - expected).norm() < 0.2 * expected.norm()


# --- hooks that were there before ------------------------------------------------------------------------------------
def hooked_by_accelerate(norm):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(norm, ModelHook())
    add_hook_to_module(norm, ModelHook(), append=True)


def hooked_by_diffusers(norm):
    from diffusers.hooks import HookRegistry, ModelHook

    for name in ("one", "two"):
        HookRegistry.check_if_exists_or_initialize(norm).register_hook(ModelHook(), name)


def hooked_by_both(norm):
    hooked_by_accelerate(norm)
    hooked_by_diffusers(norm)


def offloaded(norm):
    from accelerate import cpu_offload

    cpu_offload(norm, execution_device=torch.device("cpu"))


@both
@pytest.mark.parametrize("hook", [hooked_by_accelerate, hooked_by_diffusers, hooked_by_both, offloaded])
def test_a_norm_within_others_hooks_is_reached(name, hook):
    unet = UNETS[name]().bfloat16()
    expected = denoise(name, UNETS[name]().bfloat16())
    for layer in (unet.conv_in, unet.conv_norm_out, unet.conv_out):
        hook(layer)
    normalised = []
    unet.conv_norm_out.register_forward_hook(lambda _, inputs, output: normalised.append(output.dtype))
    assert torch.equal(denoise(name, unet), expected) and normalised == [torch.float32]
    assert torch.equal(denoise(name, unet), expected)


@both
def test_a_norm_that_cannot_be_reached_is_refused_in_half_precision(name):
    def replaced(unet):
        forward = unet.conv_norm_out.forward
        unet.conv_norm_out.forward = lambda x: forward(x)
        return unet

    with pytest.raises(ValueError, match="Expected `conv_norm_out` .* after the pipeline is made .* in float32"):
        denoise(name, replaced(UNETS[name]().bfloat16()))
    assert denoise(name, replaced(UNETS[name]())).dtype == torch.float32
    unet = UNETS[name]().bfloat16()
    expected = denoise(name, unet)
    assert torch.equal(denoise(name, replaced(unet)), expected)  # put around it later


# --- TF32 ------------------------------------------------------------------------------------------------------------
def as_tf32(x):
    """x as a graphics card multiplies it where TF32 is allowed: with 11 significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@pytest.fixture
def tf32(monkeypatch):
    """Every float32 convolution as on such a card; the layers believe to be on one."""
    conv2d = nn.functional.conv2d

    def rounding(x, weight, *arguments, **options):
        if x.dtype == torch.float32:
            x, weight = as_tf32(x), as_tf32(weight)
        return conv2d(x, weight, *arguments, **options)

    monkeypatch.setattr(nn.functional, "conv2d", rounding)
    monkeypatch.setattr(precision, "_takes_tf32", lambda x: x.dtype == torch.float32)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_ends_are_of_float32_where_convolutions_are_of_tf32(name, dtype, tf32, monkeypatch):
    """Weights of half precision, and of float32 under autocast: both lose nothing, and would lose a lot."""
    unet = UNETS[name]().to(dtype)
    between, errors = Between(unet), {}
    for guarded in (True, False):
        if not guarded:
            monkeypatch.setattr(precision, "_takes_tf32", lambda x: False)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            output = denoise(name, unet)
        read = between.first[0]
        with torch.no_grad():
            exact = copy.deepcopy(unet.conv_in).double()(read.double())
            with float32_ends(unet), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                features = unet.conv_in._convolve(read, unet.conv_in.weight, unet.conv_in.bias)
            errors[guarded] = x0_error(output, between.exact_output()), float((features - exact).norm() / exact.norm())
    assert errors[True][0] < 0.01 < 0.1 < errors[False][0]
    assert errors[True][1] < 1e-6 < 1e-4 < errors[False][1]


def test_a_network_of_float32_computes_as_torch_is_set(tf32):
    unet, x = tiny_unet(), latents()
    with torch.no_grad():
        expected = tiny_unet()(x, T, text()["prompt_embeds"]).sample
    assert torch.equal(denoise("modelscope", unet, x), expected)


def test_both_parts_of_a_number_add_up_and_the_first_is_exact_in_tf32():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-5, 5).repeat(1000)
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1.0, 2**0.5, torch.finfo(torch.float32).tiny])]).requires_grad_()
    coarse, rest = precision._split(x)
    assert torch.equal(coarse, as_tf32(coarse)) and torch.equal(coarse + rest, x)
    lost = (as_tf32(rest).double() - rest.double()).abs()
    assert (lost <= x.double().abs() * 2**-22).all() and lost.max() > 0
    (3 * coarse + 3 * rest).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))
    for broken in (torch.inf, torch.nan):
        assert not sum(precision._split(torch.tensor([broken]))).isfinite()


def test_gradients_of_split_convolutions_are_those_of_whole_ones(monkeypatch):
    gradients = {}
    for split in (True, False):
        monkeypatch.setattr(precision, "_takes_tf32", lambda x, split=split: split)
        for dtype in (torch.bfloat16, torch.float32):
            layer = OutputConv2d(4, 3, 3, padding=1).to(dtype)
            layer.float32_calls = 1
            for value, parameter in enumerate(layer.parameters(), 1):
                parameter.data = torch.linspace(-1, value, parameter.numel()).view_as(parameter).to(dtype)
            x = latents()[:, :, 0].clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                layer(x).square().sum().backward()
            gradients[split, dtype] = [x.grad, *(parameter.grad.float() for parameter in layer.parameters())]
    for dtype in (torch.bfloat16, torch.float32):
        for split, whole in zip(gradients[True, dtype], gradients[False, dtype]):
            torch.testing.assert_close(split, whole, rtol=torch.finfo(dtype).eps * 10, atol=1e-3)


class Ends(nn.Module):
    """A UNet with nothing between its ends: compiling a whole one takes its time."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_norm_out = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return self.conv_out(nn.functional.silu(self.conv_norm_out(self.conv_in(x))))


@torch.no_grad()
def test_a_compiled_network():
    network, x = Ends().bfloat16(), latents()[:, :, 0]
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    stock = network(x.bfloat16())
    for _ in range(2):
        with float32_ends(network):
            expected = network(x)
        with float32_ends(compiled):
            result = compiled(x)
        assert result.dtype == torch.float32 and torch.equal(result, expected)
        assert torch.equal(compiled(x.bfloat16()), stock)


# --- in a pipeline ---------------------------------------------------------------------------------------------------
def make_pipe(name) -> MCMPipeline:
    if name == "modelscope":
        pipe = ModelScopeMCMPipeline(**tiny_components() | dict(scheduler=MCMScheduler(**SCHEDULER)))
    else:
        scheduler = MCMScheduler(**ANIMATEDIFF_SCHEDULER)
        pipe = AnimateDiffMCMPipeline(**tiny_animatediff_components() | dict(scheduler=scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=torch.bfloat16)


def sample(pipe, **options):
    size = dict(num_frames=NUM_FRAMES, height=SIZE, width=SIZE, num_inference_steps=2, output_type="latent")
    return pipe(prompt="a red ring", generator=torch.Generator().manual_seed(0), **size | options)[0]


@both
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_latents_between_the_steps_are_float32_and_so_is_guidance(name, guidance_scale):
    pipe, seen, outputs = make_pipe(name), [], []
    step = pipe.scheduler.step

    def watched(output, t, x, **options):
        outputs.append(output)
        return step(output, t, x, **options)

    pipe.scheduler.step = watched
    options = dict(guidance_scale=guidance_scale)
    result = sample(pipe, callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["latents"]), **options)
    assert {each.dtype for each in (*seen, *outputs)} == {torch.float32}
    assert result.dtype == torch.bfloat16 and torch.equal(result, seen[-1].bfloat16())
    assert sample(pipe, output_type="pt", **options).isfinite().all()
    pipe.scheduler = DDIMScheduler(**SCHEDULER, clip_sample=False)
    assert sample(pipe, **options).isfinite().all()


def test_the_same_seed_is_the_same_noise_in_every_precision():
    pipes = [make_pipe("modelscope"), make_pipe("modelscope").to(dtype=torch.float32)]
    size = (1, 4, 4, SIZE, SIZE)
    starts = [pipe.prepare_latents(*size, pipe.unet.dtype, "cpu", torch.Generator().manual_seed(0)) for pipe in pipes]
    assert torch.equal(*starts) and starts[0].dtype == torch.float32


def test_diffusers_pipeline_may_have_the_same_networks():
    ours = make_pipe("animatediff")
    components = {key: value for key, value in ours.components.items() if key != "motion_adapter"}
    theirs = AnimateDiffPipeline(**components, motion_adapter=tiny_motion_adapter())
    theirs.set_progress_bar_config(disable=True)
    fresh = AnimateDiffPipeline(**tiny_animatediff_components(), motion_adapter=tiny_motion_adapter())
    fresh.scheduler = theirs.scheduler
    fresh.set_progress_bar_config(disable=True)
    fresh.to(dtype=torch.bfloat16)
    first = sample(ours)
    assert torch.equal(sample(theirs, guidance_scale=1.0), sample(fresh, guidance_scale=1.0))
    assert torch.equal(sample(ours), first)
    kinds = [type(getattr(ours.unet, name)) for name in ("conv_in", "conv_norm_out", "conv_out")]
    assert kinds == [InputConv2d, OutputGroupNorm, OutputConv2d]
