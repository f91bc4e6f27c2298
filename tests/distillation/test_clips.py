import torch

from diffusers_mcm.distillation.clips import EncodedClips
from tests.distillation.test_student import BASE, NEGATIVE, PIXELS, TEXT, make_adversary, make_draws, make_student
from tests.tiny import NUM_FRAMES


def test_a_step_on_encoded_clips_is_one_on_pixels():
    """To the bit: the same posterior, of which the same sample is drawn."""
    student = make_student(lambda_real=1.0)
    draws, adversary = make_draws(student), make_adversary(student)
    with torch.no_grad():
        posterior = BASE.encode_posterior(student.vae, PIXELS)
        clips = EncodedClips(*posterior, NUM_FRAMES).to(torch.device("cpu"))
        one, other = (student(each, TEXT, NEGATIVE, draws, adversary) for each in (PIXELS, clips))
        third = student(clips._replace(deviation=2 * clips.deviation), TEXT, NEGATIVE, draws, adversary)
    assert torch.equal(one.total, other.total) and torch.equal(one.generator.loss, other.generator.loss)
    assert not torch.equal(one.total, third.total)  # a sample is drawn, not the mean
