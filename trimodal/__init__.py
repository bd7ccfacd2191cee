"""One model of images, text and audio: what the commands share, in folders by the job done."""

__version__ = "0.2.0"
