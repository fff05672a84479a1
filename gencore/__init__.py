from gencore.noise import Key as Key
