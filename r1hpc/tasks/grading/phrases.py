"""Read the words around an answer in ten languages: what introduces, denies, bounds or scales a value.

    plainer("答案是42")                 # "the answer is 42"
    plainer("41 oder 5 Millionen")      # "41 or 5000000"
    is_denied("не более 42")            # True

English, German, French, Spanish, Italian, Portuguese, Russian, Chinese, Japanese and Korean. Words that are
not listed are taken for units and other words that change no value. Used by judge_math.py and answers.py.
"""

# ruff: noqa: RUF001

import re
from fractions import Fraction
from functools import partial

_VALUE = r"[$\s]*(?=[-({\d\\])"
_FLAGS = re.IGNORECASE | re.DOTALL
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_LEAD = re.compile(
    r"\b(?:(?:die|la|el|a|il|das|le|o)\s+)?(?:(?:richtige|bonne|correcta?|corretta|правильный)\s+)?"
    r"(?:antwort|lösung|ergebnis|réponse|résultat|respuesta|resultado|risposta|risultato|resposta|ответ|результат)"
    r"(?:\s+(?:correcta|correcte|corretta|richtig))?\s*(?:ist\b|lautet\b|est\b|es\b|è|é|[:\u2014-])"
    r"|(?:最终|最終|正确|正確|正解|所以|因此)*(?:答案|答え|結果|结果|정답|답)\s*(?:应该|應該)?(?:是|为|為|は|은|는|이|[::])"
    r"|[选選]择?[择擇]?(?=\W*[A-Z])|正解は",
    re.IGNORECASE,
)
_TRANSLATED = (
    (re.compile(rf"\b(?:oder|oppure|или|либо|ou)\s+{_VALUE}", _FLAGS), " or "),
    (re.compile(r"(?<=[\d)}])\s+[ou]\s+(?=[-(\d\\])"), " or "),
    (re.compile(r"(?<=[\d)}])\s+(?:und|et|y|e|и)\s+(?=[-(\d\\])"), " and "),
    (
        re.compile(r"或者?|还是|または|あるいは|もしくは|또는|혹은|(?<=\d)\s*(?:이나|나|か)\s*(?=-?\d)"),
        " or ",
    ),
    (re.compile(r"\u3001"), ", "),
    (re.compile(r"(?<=\d)\s*(?:[和与と및]|그리고)\s*(?=-?\d)"), " and "),
    (
        re.compile(
            r"\b(?:vielleicht|möglicherweise|peut-être|quizás?|tal\s+vez|forse|talvez|возможно|может\s+быть)\b"
            r"|也许|可能|たぶん|かもしれ|아마",
            re.IGNORECASE,
        ),
        " maybe ",
    ),
    (
        re.compile(
            r"\\?%|\b(?:prozent|pour\s?cent|por\s?cent[oa]|per\s?cento|процент\w*|percent|per\s+cent)\b",
            _FLAGS,
        ),
        r"\\%",
    ),
    (re.compile(r"百分之\s*(-?[\d.]+)"), r"\1\\%"),
)
_DENIED = re.compile(
    # English: about the value before
    r"\b(?:doubt|hardly|barely|almost|nearly|near)\b|\b(?:wrong|incorrect|false|impossible|invalid|unlikely|ruled\s+out)\b(?!\s+[a-z])|\bthat['\u2019]?s\s+not\b"
    r"|\b(?:cannot|can\s?not|could\s+not|can['\u2019]t|not|nt)\s+(?:possibly\s+)?(?:be\b|(?:right|correct|true|it|valid)\b)"
    # German, French, Spanish, Italian, Portuguese, Russian: denials
    r"|\b(?:nicht|kein\w*|nie|niemals|keinesfalls|falsch|unmöglich|außer|ausser|weder|ungleich"
    r"|pas|jamais|faux|fausse|incorrecte?|sauf|aucune?|nunca|jamás|incorrect[oa]|fals[oa]|salvo|excepto|tampoco"
    r"|non|mai|sbagliat[oa]|errat[oa]|scorrett[oa]|tranne|eccetto|não|errad[oa]|incorret[oa]|exceto"
    r"|не|нет|ни|неверн\w*|неправильн\w*|нельзя|кроме|никогда|ошибочн\w*)\b"
    r"|\b(?:no\s+(?:es|son|está|puede|da|vale)|sans)\b"
    # ... bounds and ranges
    r"|\b(?:mehr\s+als|weniger\s+als|mindestens|höchstens|(?:größer|kleiner|grösser)\s+als|zwischen|bis\s+zu)\b"
    r"|\b(?:plus\s+(?:de|que|grand|petit)|moins\s+(?:de|que)|au\s+(?:moins|plus|maximum|minimum)"
    r"|(?:supérieure?|inférieure?)\s+à|jusqu['\u2019]à)"
    r"|\b(?:más|menos|mais|mayor|menor|maior)\s+(?:de|que|do\s+que)\b|\b(?:al|por\s+lo|pelo|ao)\s+menos\b"
    r"|\b(?:como|no)\s+(?:máximo|mínimo)\b|\ba\s+lo\s+sumo\b|\b(?:hasta|até|entre|tra|fra)\s+[-\d\\]"
    r"|\b(?:più|meno|maggiore|minore)\s+di\b|\balmeno\b|\bal\s+(?:massimo|minimo|più|meno)\b|\bfino\s+a\b"
    r"|\b(?:больше|меньше|более|менее|свыше|минимум|максимум|между|до|от)\s+[-\d\\]"
    # Chinese, Japanese, Korean
    r"|不(?!等式)|并非|並非|不是|没有|[错錯误誤]|間違|違い|違う|ない|ません|아[니닌님닙]|않|틀[린렸리]|오답|除了|以外|외에"
    r"|以上|以下|以内|超[过過え]|未[満满]|[大小][于於]|[多少][于於]|至[少多]|最[多少]|より|少なくとも|多くとも"
    r"|이상|이하|미만|초과|보다|최[소대]\s*\d|넘[는어]",
    _FLAGS,
)
_CHANGED = re.compile(
    r"(?<!\d)倍|的?一半|半分|分之|根号|根號|平方根|立方根|[负負](?=\d)|マイナス|절반|제곱근|마이너스|[二三两兩]倍|倍的?|역수|倒数|[阶階][乘乗]"
    r"|(?:平方|立方|제곱)(?![\s]*(?:[米厘公千分毫メセキ]|미터|센티|킬로|[ck]?m))|次方|[2二두세]\s*배"
    rf"|(?<!\\)\b(?:twice|thrice|doubles?|triples?|quadruple|half|quarter|(?:hundred|thousand|million|billion)(?:\s+and)?"
    r"|sqrt|sin|cos|tan|log|ln|exp|times|mod(?:ulo)?|inverse|doppelt\w*|zweimal|dreimal|hälfte|wurzel|moitié|racine"
    rf"|doble|mitad|raíz|doppio|metà|radice|dobro|metade|raiz|дважды|удвоенн\w*|половина|корень)\s+(?:of\s+|de\s+|di\s+|von\s+|aus\s+|из\s+|от\s+)?{_VALUE}"
    r"|(?<=[\d})])\s+(?:squared|cubed|halved|doubled|tripled|quadrupled|factorial|choose|per\s?mille|permille|tens"
    r"|tenths|hundredths|thousandths|below\s+zero|no|score|gross|bn|fewer|maximum|minimum|times\s+as|au\s+carré"
    r"|al\s+cuadrado|al\s+quadrato|ao\s+quadrado|в\s+квадрате|hoch|zum\s+quadrat)\b|(?<=\d)(?:k|-fold)\b|\u2030"
    r"|(?:\b|(?=\d))(?!(?:value|answer|result|total|sum|number|length|area|volume|distance|cost|price|count|amount"
    r"|speed|rate|product|average|mean|median|mode|maximum|minimum|age|perimeter|probability|angle|difference"
    rf"|height|width|radius|score|out)\b)(?:[a-z]+|\d)\s+of\s+{_VALUE}",
    _FLAGS,
)
_COPULA = re.compile(r"[=:]|\b(?:is|are|equals|ist|est|es|è|é)\b|\u2014|[是为為はが은는]", re.IGNORECASE)
_SCALE = {
    2: "hundred|hundert|cien|cento|со(?:т|тен|тни)|[百백](?![分万萬만])",
    3: "thousand|tausend|mille|mil|mila|тысяч[аи]?|千(?![克米瓦万])|천",
    4: "[万萬만]",
    5: "lakhs?",
    6: "mill?ion(?:en|e|s|es|i)?|millón|millones|milione|milioni|milhão|milhões|миллион(?:а|ов)?|百万|백만",
    7: "crores?",
    8: "[億亿억]",
    9: "billions?|milliarden?|milliards?|miliard[oi]|bilhão|bilhões|миллиард(?:а|ов)?",
    12: "trillions?|billionen|[兆조]",
}
_BEFORE_SCALE = r"(?<![\d.,^_])(\d[\d,]*(?:\.\d+)?)\$?(?:\s|\\[ ,;])*(?:\\text\s*\{\s*)?"
_SCALED = {
    10**power: re.compile(rf"{_BEFORE_SCALE}(?:{names})(?![a-z])\}}?", re.IGNORECASE)
    for power, names in reversed(_SCALE.items())
} | {12: re.compile(r"(?<![\d.,^_])(\d+)\s+dozens?\b", re.IGNORECASE)}
_TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBERS = {word: number for number, word in enumerate(_TEENS.split())}
_NUMBERS |= {word: 10 * number for number, word in enumerate(_TENS.split(), 2)}
_LARGE = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "dozen": 12}
_SENTENCE = re.compile(r"(?<![\d\s])[.;!]\s+|(?<=\d)[.;!]\s+(?=[A-Z])|[\u3002\n]")


def plainer(text: str) -> str:
    """Return the text with lead-ins, `or`, `and` and `percent` in English, and scaled numbers written out."""
    text = _LEAD.sub(" the answer is ", text)
    for pattern, english in _TRANSLATED:
        text = pattern.sub(english, text)
    for factor, pattern in (*_SCALED.items(), *_SCALED.items()):  # twice: `2 mil millones`
        text = pattern.sub(partial(_product, factor), text)
    return text


def is_denied(text: str) -> bool:
    """True if the last sentence with a value denies or bounds it, or makes another value of it."""
    sentences = _SENTENCE.split(text)
    last = max((n for n, each in enumerate(sentences) if re.search(r"[\d\\]", each)), default=0)
    said = _COPULA.split(sentences[last])[-1]
    return any(map(_DENIED.search, sentences[last:])) or bool(_CHANGED.search(said))


def without_cjk(text: str) -> str:
    """Replace Chinese, Japanese and Korean words by a blank: they would hide a number beside them."""
    return text if text.isascii() else _CJK.sub(" ", text).strip()


def spelled_number(text: str) -> int | None:
    """Return the value of `forty-two`, `three thousand` or `a hundred and five`; None for other text."""
    words = [each for each in re.split(r"[\s-]+", text.casefold().strip(" .")) if each != "and"]
    if words[:1] == ["a"]:
        words[0] = "one"
    total, group = 0, 0
    for word in words:
        if word in _NUMBERS:
            group += _NUMBERS[word]
        elif word in ("hundred", "dozen"):
            group *= _LARGE[word]
        elif word in _LARGE:
            total, group = total + group * _LARGE[word], 0
        else:
            return None
    return total + group if words else None


def _product(factor: int, found: re.Match[str]) -> str:
    value = Fraction(found[1].replace(",", "")) * factor
    return str(value) if value.denominator == 1 else f"{float(value)}"
