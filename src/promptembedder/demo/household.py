"""Made-up requests to a smart home, each about one action and one room, to compare two instructions."""

from __future__ import annotations

BY_ACTION = "Group the requests by what is to be done."
BY_ROOM = "Group the requests by room."
ROOMS = ("kitchen", "bedroom", "bathroom", "living room", "garage", "office")
# Per action one request for every room, in the order of ROOMS.
REQUESTS = {
    "light": (
        "Switch on the lamp above the sink.",
        "I want to read in bed, make it brighter.",
        "Dim the bulb over the bathtub.",
        "It is too dark beside the sofa, add some light.",
        "Turn off the bulb next to the parked car.",
        "Light up my desk for the video call.",
    ),
    "heating": (
        "The floor by the fridge is freezing, heat it.",
        "Make it cooler where I sleep.",
        "Warm up the tiles before my shower.",
        "Set the thermostat near the television to 21 degrees.",
        "Do not heat the place where the car stands.",
        "My hands are cold at the keyboard, turn up the radiator.",
    ),
    "music": (
        "Play jazz while I cook.",
        "Wake me with a song by the bed.",
        "Sing along with my shower: start the pop list.",
        "Put on a record for the guests on the sofa.",
        "Some rock while I repair the car, please.",
        "Stop the music, I am in a meeting at my desk.",
    ),
    "window": (
        "Open the window over the stove.",
        "Close the shutters, I am going to sleep.",
        "Let the steam of the shower out, open the window.",
        "Draw the curtains, the sun is on the television.",
        "Close the door behind the car.",
        "Pull down the blind in front of my monitor.",
    ),
}
TEXTS = [text for texts in REQUESTS.values() for text in texts]
ACTION_OF = [action for action, texts in REQUESTS.items() for _ in texts]
ROOM_OF = [room for texts in REQUESTS.values() for room, _ in zip(ROOMS, texts, strict=True)]
