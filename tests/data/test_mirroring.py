"""Mirroring: pictures of which all that is said stays true, in the two languages whose words for it are known."""

import numpy as np
import pytest

from trimodal.data.mirroring import is_english, may_mirror, names_no_side, stays_true
from trimodal.data.samples import Sample, SampleTable
from trimodal.sets.synthetic import read

ENGLISH_SETS = {"coco", "synthetic", "stamps"}
ENGLISH = """
a dog|two dogs|A cat.|a red car|black cat|dog on grass|children playing|a bird in a tree|the beach at night
a small house
a man riding a wave on top of a surfboard|A group of people standing around a kitchen preparing food.
Two young girls are eating cake at a birthday party.|A large bus sitting next to a very tall building.
A woman wearing a net on her head cutting a cake.|There is a black cat that is sitting on the toilet lid.
a fire hydrant in front of a brick wall|Three teddy bears, each a different colour, snuggling together.
The man at bat readies to swing at the pitch while the umpire looks on.|A child’s toy lies on a wooden floor
An old photograph of a church by the sea|several zebras grazing in a field – one looks up
A plate of broccoli, rice and chicken with a fork beside it.|a couple of boats that are in the water
A bathroom with a sink, a mirror and a bathtub.|Skier goes down a snowy slope between the trees
A little boy holds an umbrella in the rain.|The giraffes are standing near the fence of the zoo.
a horse pulls a cart along a dirt road|A blue and white airplane flying in a cloudy sky
people with kites on the beach|a desk with a laptop, a keyboard and a cup of coffee
a small red circle on a white background
""".replace("\n", "|").strip("|").split("|")

# Written with Latin letters alone wherever people do so: other writing is told at once.
OTHERS = {
    "Chinese": "狗在猫的左边|一只狗|右侧有一辆车|草地上的狗。|dog 在左边",
    "pinyin": "ni hao|yi zhi gou zai mao de zuobian|zhe shi yi ge nan ren he yi zhi gou|you men",
    "Japanese": "犬が右にいる|inu ga migi ni iru|neko to inu",
    "Korean": "개가 왼쪽에 있다|gae wa goyangi",
    "Russian": "собака слева от кошки|sobaka sleva ot koshki",
    "Arabic": "كلب على اليسار|kalb ala al yasar",
    "Hebrew": "כלב משמאל",
    "Hindi": "कुत्ता बाईं ओर|kutta ghar ke samne",
    "French": "un chien|chien à gauche|le chat orange est dans la voiture|deux hommes sur un banc|table de restaurant|"
              "une photo de plage|train rouge|un homme avec un sandwich|sport en plein air|une table en plein air",
    "German": "ein Hund|Hund links im Bild|der Mann mit dem Hut|Katze auf einer Bank|Hand in Hand|rotes Auto im Park|"
              "Kind mit Ball am Wasser|Hotel am Strand|Mann fast so alt|drei Boote im Hafen",
    "Spanish": "un perro|perro a la izquierda|dos hombres en el parque|mesa de restaurante|una pizza grande|coche rojo|"
               "hombre con sombrero|taxi en la plaza",
    "Italian": "un cane|cane a sinistra|gatto sul divano|due uomini in un bar|una pizza|il treno in stazione|auto",
    "Portuguese": "um cachorro|a casa|cachorro na grama|dois homens no parque|o gato na sofa|a pizza|carro vermelho",
    "Dutch": "een hond|hond in het water|man op de fiets|twee katten|man in een boot|de hand van een man|rode auto|"
             "hond links van de kat|was in water",
    "Swedish": "en hund|hund till vänster|en man i en bil|katt med boll|tre hundar i parken",
    "Danish": "en hund|mand og hund|to hunde på en bil|hund til venstre|en and i vandet",
    "Norwegian": "en hund|to menn og en hund|hund til høyre|barn med ball",
    "Finnish": "koira|koira vasemmalla|koira ja kissa|mies autossa",
    "Polish": "pies|pies po lewej|kot na stole|dwa psy na trawie|czerwone auto",
    "Czech": "pes vlevo|pes a kocka|muz s kloboukem",
    "Turkish": "bir kopek|köpek solda|araba ve otobus|kopek sagda",
    "Indonesian": "seekor anjing|anjing di sebelah kiri|dua orang di taman|orang di atas motor",
    "Vietnamese": "con chó bên trái|mot con cho|hai nguoi",
    "Romanian": "un caine|caine in stanga|masina si om|doi oameni",
    "Hungarian": "egy kutya|a kutya|kutya balra|a ház",
    "Tagalog": "ang aso|aso sa kaliwa|dalawang aso",
    "Swahili": "mbwa|mbwa wawili|mtu na mbwa",
    "Esperanto": "hundo|hundo sur herbo",
    "none": "12345|DSC_0001|???|img 20240101 123456|xkcd|☃|",
}


def test_english_captions_are_told_from_those_of_other_languages() -> None:
    assert [text for text in ENGLISH if not is_english(text)] == []
    others = [(language, text) for language, texts in OTHERS.items() for text in texts.split("|")]
    assert len(OTHERS) > 25 and [found for found in others if is_english(found[1])] == []
    assert not is_english("the dog 狗") and not is_english("the dog and le chat") and is_english("the dog’s ball")


FALSE_IN_A_MIRROR = """
a dog on the left|the cat is right of the dog|the leftmost dog|the rightmost house|a car going leftward
the dog runs rightwards
a man raises his left hand|a left-handed player|the man is lefthanded|a lefty with the ball|a cat at the top-left
the red ball at the bottomright|the clock's hands turn clockwise|people running counterclockwise|the boat from starboard
a train facing west|the eastern tower|a sign that says stop|the shirt with the number 5|the letter b
the word dog on a wall
a sign with the text "no parking"|writing on a wall|a map of the city|the flag of Ireland|the clock shows five o'clock
the clock shows 10:45|a building with the name “bank” above its door|the r on the keyboard|a white l on a red door
""".replace("\n", "|").strip("|").split("|")
TRUE_IN_A_MIRROR = """
bright lights in the city|the man stands upright|leftover pizza on a plate|a copyright on the picture
the dog ate the leftovers
a number of cars on the street|a letterbox beside the door|the woman reading a book|a midnight sky with stars
a stop sign
""".replace("\n", "|").strip("|").split("|")


@pytest.mark.parametrize("known", [False, True])
def test_what_a_mirror_makes_false_is_known_and_what_only_looks_like_it_too(known: bool) -> None:
    assert [text for text in FALSE_IN_A_MIRROR if stays_true(text, known_english=known)] == []
    assert [text for text in TRUE_IN_A_MIRROR if not stays_true(text, known_english=known)] == []
    assert stays_true("A gazelle.", known_english=True) and not stays_true("A gazelle.")  # in doubt not
    assert not stays_true("狗在猫的左边", known_english=True)  # a translation of a known set


def test_of_chinese_captions_those_stay_true_that_name_no_side_and_no_writing() -> None:
    stays = "一只狗在草地上奔跑。|穿红衣服的女孩|两只猫，一只狗|３个苹果！|一輛紅色的汽車|天上有飞机……".split("|")
    false = ("狗在猫的左边|右手拿着球|一辆车向东开|朝西的房子|顺时针转动的风扇|字母Ｂ|写着停的牌子|５号球衣|红色的国旗"
             "|三点钟|10:45的钟|商店的招牌“咖啡”|世界地图|停车标志|順時針|東邊的塔").split("|")
    other = "右にいる犬|犬がいる|左 dog|a 狗|T恤|개 狗|собака 狗".split("|")
    for known in (False, True):
        assert [text for text in stays if not stays_true(text, known_english=known)] == []
        assert [text for text in [*false, *other] if stays_true(text, known_english=known)] == []


def test_labels_that_name_a_side_are_known_in_many_languages() -> None:
    sided = ("left_arm", "arm-left", "arm_L", "Right lung", "rightleg", "左", "右手", "gauche", "main droite", "links",
             "rechts", "izquierda", "destra", "справа", "vänster", "venstre", "kiri", "sağ", "يمين", "왼쪽", "digits",
             "letter_b", "8:30", "armLeft", "turnRight", "posL")
    plain = ("dog", "chien", "Hund", "狗", "apple pie", "bright", "copyright", "solid", "normal", "ball",
             "youth", "n02085620", "class_1", "lion", "r2d2")
    assert [label for label in sided if names_no_side(label)] == []
    assert [label for label in plain if not names_no_side(label)] == []


def test_a_picture_is_mirrored_only_if_all_its_captions_and_labels_allow_it() -> None:
    def picture(*captions: str, labels: tuple[str, ...] = (), source: str = "manifest", image: str = "1.jpg") -> Sample:
        return Sample(key="1", source=source, split="train", image=image, captions=captions, labels=labels)

    table = SampleTable.pack([
        picture("a dog", "the dog runs"), picture("a dog", "a dog on the left"), picture("a dog", "un chien"),
        picture("un chien"), picture(), picture(labels=("dog",)), picture("a dog", labels=("pets", "left_paw")),
        picture("An aardvark.", source="stamps"), picture("An aardvark."), picture("a dog", image=""),
        picture("a dog", "一只狗"), picture("a dog", "左边的狗")])
    assert may_mirror(table, ENGLISH_SETS).tolist() == [
        True, False, False, False, True, True, False, True, False, False, True, False]
    assert may_mirror(SampleTable.pack([]), ENGLISH_SETS).shape == (0,)


def test_most_of_the_drawn_pictures_name_a_side() -> None:
    table = SampleTable.pack(read("train", images=1800, sounds=128))
    named = [any(side in text for text in table.captions_of(row) for side in ("left", "right"))
             for row in range(len(table))]
    assert np.array_equal(may_mirror(table, ENGLISH_SETS), table.has_image & ~np.array(named))


def test_a_set_whose_captions_somebody_translated_is_not_mirrored() -> None:
    def captioned(source: str, *captions: str) -> SampleTable:
        return SampleTable.pack(Sample(key=str(i), source=source, split="train", image=f"{i}.jpg", captions=(text,))
                                for i, text in enumerate(captions))

    german = ("links steht ein Hund", "zwei Katzen auf dem Sofa", "Pferde", "eine Frau mit Hut", "der Mann ist gross")
    english = ("A horse.", "a horse on sand", "Aardvarks", "one un sign in six", "an aardvark", "two dogs", "cats run")
    assert not may_mirror(captioned("coco", *german), ENGLISH_SETS).any()
    assert may_mirror(captioned("coco", *english), ENGLISH_SETS).sum() >= 6
