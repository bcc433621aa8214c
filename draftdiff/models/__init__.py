"""From a name or a folder to something that generates video, pictures or text, on a device and in a dtype."""
