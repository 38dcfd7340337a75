// Pictures as numbers: reading them from PNG files, and writing what is held fixed as the server wants it.

/**
 * A picture in a model's format.
 * @typedef {{height: number, width: number, channels: number, values: Uint8Array}} Picture values row by row, then channel
 */

/** Read a PNG, given as an address that starts with data:, as a picture of a model. */
export async function readPicture(address, model) {
  const [height, width, channels] = model.picture_shape;
  const image = new Image();
  image.src = address;
  try {
    await image.decode();
  } catch {
    throw new RangeError("This file is not a picture that can be read.");
  }
  if (image.naturalHeight !== height || image.naturalWidth !== width) {
    throw new RangeError(
      `The picture has ${image.naturalWidth} × ${image.naturalHeight} pixels, and the model's have ${width} × ${height}.`,
    );
  }
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const values = new Uint8Array(height * width * channels);
  for (let pixel = 0; pixel < height * width; pixel += 1) {
    const [red, green, blue] = data.subarray(4 * pixel, 4 * pixel + 3);
    if (channels === 3) values.set([red, green, blue], 3 * pixel);
    else values[pixel] = red === green && green === blue ? red : Math.round(0.299 * red + 0.587 * green + 0.114 * blue);
  }
  if (values.some((value) => value > model.top_pixel)) {
    throw new RangeError(`The model's pixels go up to ${model.top_pixel}, and the picture has brighter ones.`);
  }
  return { height, width, channels, values };
}

/** Read a chosen file as an address that starts with data:. */
export function addressOf(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new RangeError("The file cannot be read."));
    reader.readAsDataURL(file);
  });
}

/** Return how many leading digits of a painted pixel can be kept: none where digits say nothing of brightness. */
export function keepable(model) {
  return model.codec.permuted ? 0 : model.codec.target_length - 1;
}

/**
 * Return the field `known` of a request.
 *
 * @param {Picture} picture
 * @param {boolean[]} painted pixels to be drawn again, row by row.
 * @param {number} keep leading digits of painted pixels that stay; 0 draws them entirely anew.
 * @param {object} model of /info.
 */
export function knownOf(picture, painted, keep, model) {
  return keep === 0 ? { pixels: fixedPixels(picture, painted) } : { digits: fixedDigits(picture, painted, keep, model) };
}

function rowsOf({ height, width }, valueAt) {
  return Array.from({ length: height }, (_, y) => Array.from({ length: width }, (_, x) => valueAt(y * width + x)));
}

function fixedPixels(picture, painted) {
  const { channels, values } = picture;
  return rowsOf(picture, (pixel) => {
    if (painted[pixel]) return null;
    return channels === 1 ? values[pixel] : [...values.subarray(channels * pixel, channels * (pixel + 1))];
  });
}

function fixedDigits(picture, painted, keep, model) {
  const { base, target_length: length } = model.codec;
  return rowsOf(picture, (pixel) =>
    tokensOf(picture, pixel, model).map((token) =>
      digitsOf(token, base, length).map((digit, index) => (painted[pixel] && index >= keep ? null : digit)),
    ),
  );
}

// One token a channel; or, for super-tokens, the 24 bits of a pixel as two numbers of 12.
function tokensOf({ channels, values }, pixel, model) {
  const parts = [...values.subarray(channels * pixel, channels * (pixel + 1))];
  if (model.network.packing !== "rgb24") return parts;
  const number = parts[0] * 65536 + parts[1] * 256 + parts[2];
  return [Math.floor(number / 4096), number % 4096];
}

function digitsOf(token, base, length) {
  const digits = [];
  for (let rest = token; digits.length < length; rest = Math.floor(rest / base)) digits.unshift(rest % base);
  return digits;
}
