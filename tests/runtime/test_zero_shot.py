"""Ready-made classes and prompts, and what a classification tells."""

import torch

from vitrail.runtime.zero_shot import CLASS_SETS, TEMPLATES, Classification, class_prompts


def test_imagenet_has_a_thousand_different_names_at_their_labels():
    language, names = CLASS_SETS["imagenet"]
    assert language == "en"
    assert len(names) == len(set(names)) == 1000
    known = {
        0: "tench",
        207: "Golden Retriever",
        281: "tabby cat",
        340: "zebra",
        388: "giant panda",
        409: "analog clock",
    }
    known |= {609: "jeep", 751: "racing car", 817: "sports car", 963: "pizza", 980: "volcano", 999: "toilet paper"}
    assert {label: names[label] for label in known} == known
    assert all(name == name.strip() and name for name in names)


def test_every_set_speaks_a_language_that_has_prompts():
    for name, (language, names) in CLASS_SETS.items():
        assert language in TEMPLATES, name
        assert len(set(names)) == len(names), name
    assert {language for language, _ in CLASS_SETS.values()} == set(TEMPLATES)
    for language, templates in TEMPLATES.items():
        assert len(set(templates)) == len(templates), language
        assert all(template.count("{}") == 1 for template in templates), language


def test_every_name_of_a_class_stands_in_every_template():
    names, prompts = class_prompts(["cat", ("dog", "hound")], ["a {}.", "the {{}}: {}"])
    assert names == ["cat", "dog"]
    assert prompts == (
        ("a cat.", "the {cat}: cat"),
        ("a dog.", "the {dog}: dog", "a hound.", "the {hound}: hound"),
    )


def test_a_list_is_prompted_in_english_and_a_set_in_its_own_language():
    assert class_prompts(["cat"])[1][0][0] == "a photo of a cat."
    assert class_prompts("cifar10-zh")[1][3] == tuple(form.replace("{}", "猫") for form in TEMPLATES["zh"])
    assert class_prompts("cifar10-zh", "it")[1][0][0] == "una foto di 飞机."
    assert class_prompts(["cat"], "just {}")[1] == (("just cat",),)


def test_a_classification_names_the_likeliest_classes():
    found = Classification(["a", "b", "c"], torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]]))
    assert found.labels == ["b", "a"]
    assert [[name for name, _ in row] for row in found.top(2)] == [["b", "c"], ["a", "c"]]
    assert len(found.top()[0]) == 3
