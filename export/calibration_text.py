"""The words of the built-in calibration set: what the shipped pictures show, and running text of several kinds."""

from __future__ import annotations

CONTINUE = "Write a short text."

SHIPPED = {
    "line.png": ("Read the text.", "A90L6QM7A2JX"),
    "note.png": ("Read the text.", "FINE BAIG\nbmwap5ag\nRS48 RN:A\nmetal"),
    "receipt.png": ("Read the text.", "UPPER VIEW\nJUICE 18.02\nSUGAR 79.57\nBEEF 75.61\nTotal 173.20"),
    "shapes.png": ("How many stars are there?", "4"),
}
"""(question, answer) by the name of the picture."""

TEXTS: tuple[tuple[str, str], ...] = (
    (
        "What can be seen from the window?",
        (
            "From the window one looks down on a narrow yard with two bicycles, a row of green bins and a chestnut tree "
            "that has lost half of its leaves. Behind the wall a train passes every ten minutes. The roofs across the "
            "street are wet, and above them the sky is clearing from the west."
        ),
    ),
    (
        "How do I change the filter?",
        (
            "1. Switch the machine off and let it cool for 20 minutes.\n2. Turn the grey cap to the left until it clicks.\n"
            "3. Pull the old filter out; a little water may follow.\n4. Rinse the new filter, push it in, and close the "
            "cap.\n5. Run two cups of water through it before you make coffee."
        ),
    ),
    (
        "Read the table.",
        (
            "Item            Qty   Price\nBread 750 g       1    3.20\nApples, kg      1.4    4.06\nMilk 3.5 %        2    "
            "2.78\nBatteries AA      4    5.96\nSubtotal              16.00\nVAT 7 %                1.05\nTotal EUR       "
            "      17.05\nPaid by card ****4821, 2024-03-18 09:41"
        ),
    ),
    (
        "Write a function that finds the largest gap in a sorted list.",
        (
            "def largest_gap(values: list[float]) -> float:\n    if len(values) < 2:\n        return 0.0\n    pairs = "
            "zip(values, values[1:])\n    return max(after - before for before, after in pairs)\n\nIt compares each value "
            "with the next one, so it takes time in proportion to the length of the list."
        ),
    ),
    (
        "Summarize the letter.",
        (
            "Dear Ms Okafor, thank you for your letter of 12 June. The repair of the lift will begin on Monday and take "
            "about three weeks. During this time the rear entrance stays open from 6:00 to 22:00. Residents who need help "
            "with the stairs can call 030 5557 1290; someone will come within half an hour. Yours sincerely, J. Lindqvist"
        ),
    ),
    (
        "Give me the same as JSON.",
        (
            '{"invoice": "A-20417", "date": "2023-11-05", "buyer": {"name": "Haus & Hof GmbH", "city": "Kassel"}, '
            '"lines": [{"text": "hinge, brass", "count": 12, "price": 2.45}, {"text": "screws 4x30", "count": 200, '
            '"price": 0.04}], "total": 37.40, "paid": false}'
        ),
    ),
    (
        "Why is the sky blue?",
        (
            "Sunlight is a mixture of all colours. Air molecules are much smaller than the wavelength of light, and they "
            "scatter short waves far more strongly than long ones: blue at 450 nm about four times as much as red at 650 "
            "nm. So blue light reaches our eyes from every direction. At sunset the path through the air is long, most "
            "of the blue is lost on the way, and what is left looks red."
        ),
    ),
    (
        "Was steht auf dem Schild?",
        (
            "Auf dem Schild steht in großen weißen Buchstaben „Achtung, Baustelle“. Darunter ist ein Pfeil nach rechts, "
            "und kleiner: „Umleitung über die Gärtnerstraße bis 30. September. Fußgänger und Radfahrer frei.“"
        ),
    ),
    (
        "Qu'est-ce qu'il y a sur la table ?",
        (
            "Sur la table, il y a une cafetière rouge, deux tasses vides, un journal plié et une assiette avec trois "
            "croissants. Près de la fenêtre, un chat dort sur une chaise. La lumière vient de la gauche."
        ),
    ),
    (
        "图片里有什么？",
        (
            "图片里是一条安静的小街。左边有一家书店，门口放着两把蓝色的椅子；右边停着一辆白色的自行车。"
            "远处可以看到一座石桥，桥上有几个人在散步。招牌上写着“旧书新知，营业时间：十点到十八点”。"
        ),
    ),
)
"""(question, text). The first ones, which are plain ASCII, are also drawn as pages."""
