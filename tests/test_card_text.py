from diffusers_mcm.card_text import files_shown, is_untouched, sealed, without_seal

CARD = "---\ntags: [a]\n---\n\n# A LoRA\n\nof moving shapes\n"


def test_a_card_tells_whether_it_was_edited():
    text = sealed(CARD)
    assert is_untouched(text) and is_untouched(text.replace("\n", "\r\n")) and is_untouched(text + "\n\n")
    assert is_untouched(CARD) is None
    for edited in (text.replace("moving", "still"), text + "and more\n", text.replace("\n<!--", "\nmore\n<!--")):
        assert not is_untouched(edited)
    assert without_seal(text) == without_seal(CARD) == CARD and sealed(without_seal(text)) == text


def test_the_files_that_a_card_shows():
    text = """---
widget:
- text: data and steps
  output:
    url: sample.mp4
---
![some samples](./grid.png) of [the log](logs/train%20log.txt#end), [a page](https://huggingface.co/me), steps
<video src="clips/one.mp4" poster='one.png'></video> teaser.png
"""
    here = {"sample.mp4", "grid.png", "logs/train log.txt", "clips/one.mp4", "one.png"}
    assert files_shown(text) == here | {"https://huggingface.co/me"}
