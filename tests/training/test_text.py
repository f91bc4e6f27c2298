import torch

from diffusers_mcm.training.networks import CachedTextEncoder


def test_each_caption_is_encoded_once_and_rows_keep_their_order():
    seen = []

    def encode(captions):
        seen.append(captions)
        return {"prompt_embeds": torch.tensor([[float(len(caption))] for caption in captions])}

    text = CachedTextEncoder(encode, capacity=2)
    assert text(["aa", "b", "aa"])["prompt_embeds"].tolist() == [[2], [1], [2]]
    assert text(["b"])["prompt_embeds"].tolist() == [[1]]
    assert seen == [["aa"], ["b"]]
    text(["ccc"])  # drops "aa", which was not used for longest
    text(["b"])
    assert seen == [["aa"], ["b"], ["ccc"]]
    text(["aa"])
    assert seen[-1] == ["aa"] and text.row.cache_info().currsize == 2
