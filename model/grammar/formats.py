"""Formats of strings -> regular expressions of strings that every reader of that format accepts.

Each expression is a part of what its RFC allows: what common parsers refuse (leap seconds, the year 0, offsets beyond
14 hours) is left out, so that an answer is valid wherever it is checked.  Knows nothing of schemas.
"""

import re
from collections.abc import Mapping

_DAY = (
    r"(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"  # months of 31 days
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8])"
)
_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_FOURTH = r"(?:0[48]|[2468][048]|[13579][26])"  # 04, 08, ..., 96: divisible by 4, without 00
_DATE = rf"(?:{_YEAR}-(?:{_DAY})|(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29)"
# RFC 3339, 5.6.  A leap second (:60) is allowed there, but Python, JavaScript and Java refuse it.  Offsets are those in
# use; .NET refuses others.  Nine digits are nanoseconds, the most that Java reads.
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:(?:0[0-9]|1[0-3]):[0-5][0-9]|14:00))"

# RFC 3339, appendix A: units follow each other without a gap.  Six digits keep a duration within Python's range.
_NUMBER = r"[0-9]{1,6}"
_CLOCK = rf"T(?:{_NUMBER}H(?:{_NUMBER}M(?:{_NUMBER}S)?)?|{_NUMBER}M(?:{_NUMBER}S)?|{_NUMBER}S)"
_DAYS = rf"{_NUMBER}D"
_MONTHS = rf"{_NUMBER}M(?:{_DAYS})?"
_CALENDAR = rf"(?:{_NUMBER}Y(?:{_MONTHS})?|{_MONTHS}|{_DAYS})"
_DURATION = rf"P(?:{_CALENDAR}(?:{_CLOCK})?|{_CLOCK}|{_NUMBER}W)"

# RFC 1123.  Labels are kept to 41 characters and five, which stays below all limits of length, and have no two hyphens
# in a row, which only encoded international names have.  The last label begins with a letter: it is not an address.
_LABEL = r"[A-Za-z0-9]{1,13}(?:-[A-Za-z0-9]{1,13}){0,2}"
_LAST_LABEL = r"[A-Za-z][A-Za-z0-9]{0,12}(?:-[A-Za-z0-9]{1,13}){0,2}"
_HOST = rf"(?:{_LABEL}\.){{0,4}}{_LAST_LABEL}"
_DOMAIN = rf"(?:{_LABEL}\.){{1,4}}[A-Za-z]{{2,20}}"
# RFC 5321: Dot-string, at most 64 characters.
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,20}"
_EMAIL = rf"{_ATOM}(?:\.{_ATOM}){{0,2}}@{_DOMAIN}"

_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_GROUP = r"[0-9a-fA-F]{1,4}"


def _ipv6() -> str:
    """RFC 4291, 2.2: eight groups, or fewer around one `::`; the last two may be an IPv4 address."""
    whole = rf"(?:{_GROUP}:){{6}}(?:{_GROUP}:{_GROUP}|{_IPV4})"
    shortened = [
        # `before` groups, `::`, and at most as many as are then left out, one at least.
        rf"{_groups(before)}::(?:{_tail(7 - before)})?"
        for before in range(8)
    ]
    return "|".join([whole, *shortened])


def _groups(count: int) -> str:
    return "" if count == 0 else rf"{_GROUP}(?::{_GROUP}){{{count - 1}}}"


def _tail(most: int) -> str:
    """One to `most` groups, of which an IPv4 address is two."""
    if most == 0:
        return ""
    groups = rf"{_GROUP}(?::{_GROUP}){{0,{most - 1}}}"
    return groups if most < 2 else rf"{groups}|(?:{_GROUP}:){{0,{most - 2}}}{_IPV4}"


# RFC 3986.  Hosts are names and IPv4 addresses, and what stands after a scheme without `//` is not for schemes of the
# web (f.., h.., w..), whose readers would take it for a host.
_UNRESERVED = r"A-Za-z0-9._~!$&'()*+,;=\-"
_ESCAPE = r"%[0-9A-Fa-f]{2}"
_CHARACTER = rf"(?:[{_UNRESERVED}:@]|{_ESCAPE})"
_SEGMENTS = rf"(?:/{_CHARACTER}*)*"
_PORT = r":(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3})"
_AUTHORITY = rf"//(?:(?:[{_UNRESERVED}:]|{_ESCAPE})+@)?(?:{_HOST}|{_IPV4})(?:{_PORT})?"
_REST = rf"(?:\?(?:{_CHARACTER}|[/?])*)?(?:#(?:{_CHARACTER}|[/?])*)?"
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,30}"
_OTHER_SCHEME = r"[a-egi-vxyzA-EGI-VXYZ][A-Za-z0-9+.-]{0,30}"
_URI = rf"(?:{_SCHEME}:{_AUTHORITY}{_SEGMENTS}|{_OTHER_SCHEME}:{_CHARACTER}+{_SEGMENTS}){_REST}"
_FIRST_SEGMENT = rf"(?:[{_UNRESERVED}@]|{_ESCAPE})+"
_RELATIVE = rf"(?:{_AUTHORITY}{_SEGMENTS}|/(?:{_CHARACTER}+{_SEGMENTS})?|(?:{_FIRST_SEGMENT}{_SEGMENTS})?){_REST}"
_URI_REFERENCE = rf"{_URI}|{_RELATIVE}"

# RFC 6570, without what it reserves for later.
_VARIABLE = r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*(?::[1-9][0-9]{0,3}|\*)?"
_URI_TEMPLATE = rf"(?:[{_UNRESERVED}:@/?#\[\]]|{_ESCAPE}|\{{[+#./;?&]?{_VARIABLE}(?:,{_VARIABLE})*\}})*".replace(
    "'", ""
)

_POINTER = r"(?:/(?:[^~/]|~[01])*)*"  # RFC 6901
_UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"


def _uuid(version: int) -> str:
    return rf"[0-9a-fA-F]{{8}}-[0-9a-fA-F]{{4}}-{version}[0-9a-fA-F]{{3}}-[89abAB][0-9a-fA-F]{{3}}-[0-9a-fA-F]{{12}}"


FORMATS: Mapping[str, str] = {
    name: f"^(?:{pattern})$"
    for name, pattern in {
        "date-time": rf"{_DATE}T{_TIME}",
        "time": _TIME,
        "date": _DATE,
        "duration": _DURATION,
        "email": _EMAIL,
        "idn-email": _EMAIL,
        "hostname": _HOST,
        "idn-hostname": _HOST,
        "ipv4": _IPV4,
        "ipv6": _ipv6(),
        "uuid": _UUID,
        "uri": _URI,
        "uri-reference": _URI_REFERENCE,
        "iri": _URI,
        "iri-reference": _URI_REFERENCE,
        "uri-template": _URI_TEMPLATE,
        "json-pointer": _POINTER,
        # Some checkers take a digit after a 0 for a leading zero.
        "relative-json-pointer": rf"(?:0|[1-9]{{1,8}}0?)(?:#|{_POINTER})",
        # Pydantic's, the latter for UUID1 to UUID8.
        "ipvanyaddress": rf"{_IPV4}|{_ipv6()}",
        **{f"uuid{version}": _uuid(version) for version in (1, 3, 4, 5, 6, 7, 8)},
    }.items()
}
"""Formats that are enforced, each with the expression of its strings.  International forms are enforced as ASCII."""

_ZOD_DURATION = r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$"
_ZOD_HOSTNAME = (
    r"^(?=.{1,253}\.?$)[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
    r"(?:\.[a-zA-Z0-9](?:[-0-9a-zA-Z]{0,61}[0-9a-zA-Z])?)*\.?$"
)

IMPLIED: Mapping[str, frozenset[str]] = {
    "duration": frozenset({_ZOD_DURATION}),
    "hostname": frozenset({_ZOD_HOSTNAME}),
}
"""Patterns that zod writes next to a format, with look-around that is not supported; the format implies them."""

_ZOD_EMAILS = frozenset(
    rf"^(?!\.)(?!.*\.\.)([{letters}0-9_'+\-\.]*)[{letters}0-9_+-]@([{letters}0-9][{letters}0-9\-]*\.)+[{letters}]{{2,}}$"
    for letters in ("A-Za-z", "a-zA-Z")
)
"""Those of zod 4 and of zod-to-json-schema: no point at the beginning, and no two in a row."""

_ZOD_EMAIL = r"^(?:[A-Za-z0-9_'+-]+\.)*[A-Za-z0-9_'+-]*[A-Za-z0-9_+-]@(?:[A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z]{2,}$"

# A Decimal's in Pydantic until 2.13: a sign, digits, a point and digits, of which one at least is there.
_PYDANTIC_DECIMAL = re.compile(
    r"\^\(\?!\^\[-\+\.\]\*\$\)\[\+-\]\?0\*\\d(\*|\{0,(\d{1,3})\})\\\.\?(\\d(?:\*|\{0,\d{1,3}\}))(?:0\*)?\$"
)


def without_lookaround(pattern: str) -> str:
    """A pattern that a tool is known to write with look-around, without it; any other pattern as it is.

    The result matches a part of what the pattern matches: of decimals, numbers with a digit before their point.
    """
    if pattern in _ZOD_EMAILS:
        return _ZOD_EMAIL
    found = _PYDANTIC_DECIMAL.fullmatch(pattern)
    if found is None:
        return pattern
    count, most, fraction = found[1], found[2], found[3]
    whole = r"[0-9]+" if count == "*" else "0" if int(most) == 0 else rf"[0-9]{{1,{int(most)}}}"
    return rf"^[+-]?(?:{whole})(?:\.{fraction})?$"
