"""The stages of a run: gen -> train -> export -> eval. Only this room reads a whole recipe; other rooms get their section."""
