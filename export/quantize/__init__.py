"""How numbers are stored: `scheme` names it."""
