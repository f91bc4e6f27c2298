import torch

from diffusers_mcm.training.networks import CachedTextEncoder


def test_the_captions_of_a_batch_are_encoded_in_one_call_and_rows_keep_their_order():
    seen = []

    def encode(captions):
        seen.append(captions)
        return {"prompt_embeds": torch.tensor([[float(len(caption))] for caption in captions])}

    text = CachedTextEncoder(encode, capacity=3)
    assert text(["b", "aa", "b"])["prompt_embeds"].tolist() == [[1], [2], [1]]
    assert text(["aa", "b"])["prompt_embeds"].tolist() == [[2], [1]]  # those of before, in another order
    assert seen == [["aa", "b"]]
    # By itself: what comes out for "b" must not depend on what a run that began later has not seen.
    assert text(["b"])["prompt_embeds"].tolist() == [[1]]
    assert seen == [["aa", "b"], ["b"]]
    text(["ccc"])  # drops the first two, which were not used for longest
    text(["b"])
    assert seen == [["aa", "b"], ["b"], ["ccc"]]
    text(["aa", "b"])
    assert seen[-1] == ["aa", "b"] and len(text.kept) == 2
