"""The price of a GPU-hour."""

import re
from dataclasses import dataclass

from rlcs.errors import UserError

_PRICE = re.compile(r"(?P<before>[^\d.]*)(?P<amount>\d+(?:\.\d+)?|\.\d+)(?P<after>[^\d.]*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """The price of a GPU-hour, in a currency that has a name or none."""

    amount: float
    currency: str

    def of(self, hours: float) -> str:
        """The price of so many GPU-hours."""
        return f"{self.amount * hours:,.2f} {self.currency}".strip()


def parse_price(text: str) -> Price:
    """Read `2.5`, `2.50 USD` or `EUR 2`. Raises UserError."""
    found = _PRICE.fullmatch(text.strip())
    if found is None:
        raise UserError(f"{text!r} is not a price", where="--price", fix='such as 2.5, or "2.50 USD"')
    currency = (found["before"].strip() or found["after"].strip())[:12]
    return Price(amount=float(found["amount"]), currency=currency)
